"""What a format is: the files it consists of, and how each is read and written."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from converters.rules import Shape, Table
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
    """

    file: str
    table: Table
    shapes: Mapping[str, Shape]
    prefix: str = ""
    dtype: str | None = None

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
    """

    name: str
    what: str
    read: Callable[[Path], dict[str, Any]]
    parts: Callable[[Mapping[str, Any]], list[Part]]
    is_here: Callable[[Path], bool]
    has_config: bool = False

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
