"""What a format is: the files it consists of, and how each is read and written."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from converters.load import open_weights
from converters.rules import Shape, Table, WeightsError
from converters.safetensors_io import MAX_SHARD, Tensors
from x2jax.sources import read_config
from x2jax.trees import Skeleton, prefixed

DIFFUSERS = "diffusion_pytorch_model.safetensors"
TRANSFORMERS = "model.safetensors"
F32 = dict(dtype=jnp.float32, param_dtype=jnp.float32)
"""dtypes of a module that only its shapes are wanted of."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One file of a format.

    Attributes:
      file: its name, as written.
      table: its rules.
      shapes: our path -> shape of what it holds; paths as the table has them.
      prefix: what stands before these paths in the whole set of parameters.
      dtype: as written unless asked otherwise; None keeps the parameters' own.
      max_shard: bytes above which it is written as shards; None for never.
      metadata: of its header, besides what every file of ours has; None for none at all.
      beside: what a pickle holds beside its `state_dict`; None for a bare state dict.
    """

    file: str
    table: Table
    shapes: Mapping[str, Shape]
    prefix: str = ""
    dtype: str | None = None
    max_shard: int | None = MAX_SHARD
    metadata: Mapping[str, Any] | None = dataclasses.field(default_factory=dict)
    beside: Mapping[str, Any] | None = None

    def whole(self) -> dict[str, Shape]:
        """Its shapes under the paths of the whole set of parameters."""
        return prefixed(dict(self.shapes), self.prefix) if self.prefix else dict(self.shapes)


@dataclasses.dataclass(frozen=True)
class Format:
    """Attributes:
    name: on the command line.
    what: shown in help.
    read: folder or file -> its config, a JSON object.
    parts: config -> the files.
    is_here: whether a path looks like this format.
    has_config: whether the config is written beside the weights as `config.json`.
    kind: what it holds; formats of one kind have the same configs and parameters, and what was
      read as one can be written as another. Empty for its name.
    open: file or folder of its one part -> tensors by the names of its table.
    """

    name: str
    what: str
    read: Callable[[Path], dict[str, Any]]
    parts: Callable[[Mapping[str, Any]], list[Part]]
    is_here: Callable[[Path], bool]
    has_config: bool = False
    kind: str = ""
    open: Callable[[Path], Tensors] = open_weights

    def __post_init__(self):
        object.__setattr__(self, "kind", self.kind or self.name)
        object.__setattr__(self, "read", _with_reason(self.read, self.name))
        object.__setattr__(self, "parts", _with_reason(self.parts, self.name))

    def locate(self, path: Path, part: Part) -> Path:
        """The file of a part: itself, its safetensors twin, or the folder to search.

        Raises:
          FileNotFoundError: neither is there.
        """
        if len(self.parts(self.read(path))) == 1:
            return path
        found = there(path, part.file)
        if found is None:
            names = sorted(p.name for p in path.iterdir())
            raise FileNotFoundError(
                f"{path} lacks {part.file} (or {twin(part.file)}); it holds {names}"
            )
        return found


def _with_reason(function: Callable, name: str) -> Callable:
    """The function; what a config of other types and sizes makes it raise becomes a reason."""

    @functools.wraps(function)
    def call(argument: Any) -> Any:
        try:
            return function(argument)
        except (OSError, ValueError, ImportError):
            raise
        except Exception as e:
            reason = f"{type(e).__name__}: {ascii(str(e).split(chr(10))[0])[:200]}"
            raise WeightsError(
                name, [f"the config or shapes are not those of such a model ({reason})"]
            ) from None

    return call


def twin(file: str) -> str:
    """The safetensors name of a pickle's contents."""
    return str(Path(file).with_suffix(".safetensors"))


def there(folder: Path, file: str) -> Path | None:
    """A file of a folder, or its safetensors twin; None if it has neither."""
    return next((p for p in (folder / file, folder / twin(file)) if p.is_file()), None)


def shapes_of(make: Callable[[], nnx.Module]) -> dict[str, Shape]:
    """Our path -> shape of a module, without allocating anything."""
    return {p: tuple(x.shape) for p, x in Skeleton(nnx.eval_shape(make)).abstract.items()}


def class_is(name: str) -> Callable[[Path], bool]:
    """Whether a folder's `config.json` names a class of diffusers or a model type."""

    def check(path: Path) -> bool:
        try:
            return name in (read_config(path).get(k) for k in ("_class_name", "model_type"))
        except (OSError, ValueError):
            return False

    return check


def by_shapes(
    sizes: Callable[[Mapping[str, Shape]], dict[str, Any]],
) -> tuple[Callable[[Path], dict[str, Any]], Callable[[Path], bool]]:
    """`read` and `is_here` of a state dict without a config: its shapes say what it is.

    Args:
      sizes: external name -> shape, to a config; raises ValueError for other files, which `read`
        passes on as WeightsError.
    """

    def read(path: Path) -> dict[str, Any]:
        try:
            return sizes({n: tuple(x.shape) for n, x in open_weights(path).items()})
        except ValueError as e:
            raise WeightsError(f"weights in {path}", [str(e)]) from None

    def is_here(path: Path) -> bool:
        try:
            return bool(read(path))
        except (OSError, ValueError, ImportError):
            return False

    return read, is_here


def limited(
    config: dict[str, Any], tensors: Mapping[str, Any], *counts: str, at: str = ""
) -> dict[str, Any]:
    """The config, if it asks for no more blocks than the file has tensors.

    A number in a small file must not make us build a large model.

    Args:
      config: of a model.
      tensors: of its file.
      counts: keys of numbers of blocks, or of lists with an item a block.
      at: key of the sub-dictionary that holds them; empty for the config itself.

    Raises:
      WeightsError: it asks for more, or for something else than numbers.
    """
    inner = config.get(at, {}) if at else config
    problems = []
    if not isinstance(inner, Mapping):
        raise WeightsError("config", [f"{at} is not an object: {ascii(inner)[:80]}"])
    for key in counts:
        value = inner.get(key, 0)
        count = len(value) if isinstance(value, list) else value
        if type(count) is not int or not 0 <= count <= len(tensors):
            problems.append(
                f"{key} = {ascii(value)[:80]}, and the weights are {len(tensors)} tensors: "
                "is this the config of these weights?"
            )
    if problems:
        raise WeightsError("config", problems)
    return config
