"""The formats that `python -m converters` knows: what each holds, and the tables that read it.

To add one: a table file, and an entry in `FORMATS`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from converters import alignnet, x2edit
from converters.flux_diffusers import flux_table
from converters.load import open_weights
from converters.qwen2_5_vl import qwen_table
from converters.rules import Shape, Table, WeightsError
from converters.vae_diffusers import vae_table
from x2jax.adapters import AdapterConfig, Adapters
from x2jax.alignnet import AlignNet, AlignNetConfig
from x2jax.encoders.qwen2_5_vl import Qwen2_5_VL, QwenConfig
from x2jax.encoders.vae import VAE, VAEConfig
from x2jax.flux import FLUX_DEV, Flux, FluxConfig
from x2jax.sources import read_config
from x2jax.trees import Skeleton, prefixed

DIFFUSERS = "diffusion_pytorch_model.safetensors"
TRANSFORMERS = "model.safetensors"


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
        for name in (part.file, twin(part.file)):
            if (path / name).is_file():
                return path / name
        there = sorted(p.name for p in path.iterdir())
        raise FileNotFoundError(
            f"{path} lacks {part.file} (or {twin(part.file)}); it holds {there}"
        )


def twin(file: str) -> str:
    """The safetensors name of a pickle's contents."""
    return str(Path(file).with_suffix(".safetensors"))


def _shapes(make: Callable[[], nnx.Module]) -> dict[str, Shape]:
    return {p: tuple(x.shape) for p, x in Skeleton(nnx.eval_shape(make)).abstract.items()}


F32 = dict(dtype=jnp.float32, param_dtype=jnp.float32)


def _flux(config: Mapping[str, Any]) -> list[Part]:
    cfg = FluxConfig.from_diffusers(config)
    return [Part(DIFFUSERS, flux_table(cfg), _shapes(lambda: Flux(cfg, **F32, rngs=nnx.Rngs(0))))]


def _vae(config: Mapping[str, Any]) -> list[Part]:
    cfg = VAEConfig.from_diffusers(config)
    return [Part(DIFFUSERS, vae_table(cfg), _shapes(lambda: VAE(cfg, **F32, rngs=nnx.Rngs(0))))]


def _qwen(config: Mapping[str, Any]) -> list[Part]:
    cfg = QwenConfig.from_transformers(config)
    table = qwen_table(cfg, nested=config.get("x2jax_nested", False))
    shapes = _shapes(lambda: Qwen2_5_VL(cfg, **F32, rngs=nnx.Rngs(0)))
    return [Part(TRANSFORMERS, table, shapes)]


def _alignnet(config: Mapping[str, Any]) -> list[Part]:
    cfg = AlignNetConfig(**config)
    return [
        Part(
            DIFFUSERS,
            alignnet.alignnet_table(cfg.states, cfg.mixing),
            _shapes(lambda: AlignNet(cfg, **F32, rngs=nnx.Rngs(0))),
        )
    ]


def _x2edit(config: Mapping[str, Any]) -> list[Part]:
    lora, table = dict(config["lora"]), "task_table/embedding"
    flux = _flux_of(lora)
    cfg = adapter_config(config)
    shapes = _shapes(lambda: Adapters(cfg, flux, rngs=nnx.Rngs(0)))
    rules = x2edit.lora_table(cfg, flux.double_blocks, flux.single_blocks, flux.width)
    rest = {p: s for p, s in shapes.items() if p != table}
    align = _alignnet(config["alignnet"])[0]
    return [
        Part(x2edit.LORA, rules, rest, "adapter", "bfloat16"),
        Part(x2edit.TASKS, x2edit.task_table(), {table: shapes[table]}, "adapter"),
        dataclasses.replace(align, file=x2edit.ALIGNNET, prefix="alignnet"),
    ]


def _flux_of(lora: Mapping[str, Any]) -> FluxConfig:
    """A FLUX of the sizes that adapters depend on; its heads do not matter to them."""
    width = lora["width"]
    sizes = {k: lora[k] for k in ("double_blocks", "single_blocks", "width")}
    return dataclasses.replace(FLUX_DEV, **sizes, heads=1, head_dim=width, axes=(0, 0, width))


def adapter_config(config: Mapping[str, Any]) -> AdapterConfig:
    """The adapter that an X2Edit config describes."""
    lora = config["lora"]
    keys = ("experts", "rank", "double", "single")
    return AdapterConfig(
        **{k: tuple(v) if isinstance(v := lora[k], list) else v for k in keys},
        series=tuple(p for p in lora["double"] if p == "img_attn/proj"),
        tasks=config["tasks"],
    )


def _read_qwen(folder: Path) -> dict[str, Any]:
    nested = any(n.startswith("model.language_model.") for n in open_weights(folder))
    return read_config(folder) | ({"x2jax_nested": True} if nested else {})


def _read_alignnet(path: Path) -> dict[str, Any]:
    try:
        return alignnet.sizes({n: tuple(x.shape) for n, x in open_weights(path).items()})
    except ValueError as e:
        raise WeightsError(f"weights in {path}", [str(e)]) from None


def _read_x2edit(folder: Path) -> dict[str, Any]:
    missing = [f for f in (x2edit.LORA, x2edit.TASKS, x2edit.ALIGNNET) if not _there(folder, f)]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)} (or their safetensors twins); an X2Edit adapter "
            f"is {x2edit.LORA}, {x2edit.TASKS} and {x2edit.ALIGNNET} side by side"
        )
    table = open_weights(_there(folder, x2edit.TASKS))
    rows = {x.shape[0] for n, x in table.items() if n == "weight" and x.ndim == 2}
    if len(rows) != 1:
        raise WeightsError(
            f"weights in {table.where}",
            [f"expected one tensor, weight (tasks, width); found {sorted(table)[:5]}"],
        )
    lora = open_weights(_there(folder, x2edit.LORA))
    return {
        "lora": x2edit.sizes({n: tuple(x.shape) for n, x in lora.items()}),
        "tasks": rows.pop(),
        "alignnet": _read_alignnet(_there(folder, x2edit.ALIGNNET)),
    }


def _there(folder: Path, file: str) -> Path | None:
    return next((p for p in (folder / file, folder / twin(file)) if p.is_file()), None)


def x2edit_config(params: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a trained tree with children adapter/ and alignnet/, from its shapes.

    Raises:
      WeightsError: it is no MoE-LoRA, or the AlignNet is absent.
    """
    shapes = {p: tuple(x.shape) for p, x in params.items()}
    downs = {p: s for p, s in shapes.items() if p.startswith("adapter/") and p.endswith("/down")}
    needed = ("adapter/task_table/embedding", "alignnet/projector_in/kernel")
    missing = [p for p in needed if p not in shapes]
    if missing or not downs:
        raise WeightsError(
            "the X2Edit format", [f"missing: {p}" for p in missing or ("adapter/.../down",)]
        )
    _, width, slots, rank = next(iter(downs.values()))

    def projections(kind: str) -> dict[str, int]:
        head = f"adapter/{kind}_blocks/"
        return {
            p.removeprefix(head).removesuffix("/down"): s[0]
            for p, s in downs.items()
            if p.startswith(head)
        }

    double, single = projections("double"), projections("single")
    return {
        "lora": dict(
            experts=slots - 1,
            rank=rank,
            double=sorted(double),
            single=sorted(single),
            double_blocks=max(double.values(), default=0),
            single_blocks=max(single.values(), default=0),
            width=width,
        ),
        "tasks": shapes["adapter/task_table/embedding"][0],
        "alignnet": alignnet.sizes_of_ours(
            {p.removeprefix("alignnet/"): s for p, s in shapes.items() if p.startswith("alignnet/")}
        ),
    }


def _class_is(name: str) -> Callable[[Path], bool]:
    def check(path: Path) -> bool:
        try:
            return name in (read_config(path).get(k) for k in ("_class_name", "model_type"))
        except (OSError, ValueError):
            return False

    return check


def _is_alignnet(path: Path) -> bool:
    try:
        return bool(_read_alignnet(path))
    except (OSError, ValueError, ImportError):
        return False


FORMATS = {
    f.name: f
    for f in (
        Format(
            "x2edit",
            f"folder of {x2edit.LORA}, {x2edit.TASKS} and {x2edit.ALIGNNET}, as X2Edit publishes",
            _read_x2edit,
            _x2edit,
            lambda path: _there(path, x2edit.LORA) is not None,
        ),
        Format(
            "flux-diffusers",
            "transformer/ of a diffusers folder of FLUX.1",
            read_config,
            _flux,
            _class_is("FluxTransformer2DModel"),
            has_config=True,
        ),
        Format(
            "vae-diffusers",
            "vae/ of a diffusers folder of FLUX.1",
            read_config,
            _vae,
            _class_is("AutoencoderKL"),
            has_config=True,
        ),
        Format(
            "qwen2.5-vl",
            "transformers folder of Qwen2.5-VL (its text path)",
            _read_qwen,
            _qwen,
            _class_is("qwen2_5_vl"),
            has_config=True,
        ),
        Format(
            "alignnet",
            "AlignNet state dict of X2I or X2Edit, a file or its folder",
            _read_alignnet,
            _alignnet,
            _is_alignnet,
        ),
    )
}


def detect(path: Path) -> Format:
    """The format of a file or folder.

    Raises:
      FileNotFoundError: nothing there.
      WeightsError: none fits; the formats are listed.
    """
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    found = next((f for f in FORMATS.values() if f.is_here(path)), None)
    if found is None:
        known = [f"{f.name}: {f.what}" for f in FORMATS.values()]
        raise WeightsError(f"{path} is of no format known here", known)
    return found


def whole(part: Part) -> dict[str, Shape]:
    """Shapes of a part under the paths of the whole set of parameters."""
    return prefixed(dict(part.shapes), part.prefix) if part.prefix else dict(part.shapes)
