"""LoRA files on disk: import, export and inspection of plain LoRA for `python -m converters`."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters import lora_peft, native, safetensors_io
from converters.load import open_weights
from converters.lora import Lora, open_lora
from converters.lora_names import Layout
from converters.lora_names import detect as detect_names
from converters.lora_scale import read_settings
from converters.rules import WeightsError
from x2jax import sources
from x2jax.adapters import AdapterConfig
from x2jax.flux import FLUX_DEV, FluxConfig
from x2jax.trees import child


@dataclasses.dataclass(frozen=True)
class Options:
    """What a user may say of a LoRA file.

    Attributes:
      flux: diffusers folder of the FLUX that it belongs to, "tiny", or "" for FLUX.1's sizes.
      ignore: regular expressions of names to leave out.
    """

    flux: str = ""
    ignore: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a FLUX, as far as adapters know them."""

    double_blocks: int
    single_blocks: int
    width: int
    guidance: bool = False

    @property
    def mlp_width(self) -> int:
        return 4 * self.width


def detect(path: Path) -> Layout | None:
    """The layout of a LoRA file or folder; None if it is something else.

    Raises:
      WeightsError: names of several layouts in one file.
    """
    try:
        names = list(open_weights(path))
    except (OSError, ValueError, ImportError):
        return None
    return detect_names(names)


def read(path: Path, layout: Layout, options: Options) -> Lora:
    """A LoRA file, checked as a whole.

    Raises:
      FileNotFoundError, ImportError, WeightsError: as `open_weights` and `open_lora`.
    """
    tensors = open_weights(path)
    return open_lora(
        tensors,
        layout,
        _flux(options.flux),
        settings=read_settings(path, tensors.metadata),
        ignore=options.ignore,
    )


def _flux(where: str) -> FluxConfig:
    if not where:
        return FLUX_DEV
    root = sources.folder(where, "flux", "flux")
    root = root / "transformer" if (root / "transformer").is_dir() else root
    return FluxConfig.from_diffusers(sources.read_config(root))


def import_(
    path: Path, layout: Layout, out: Path, options: Options, dtype: str | None = None
) -> list[Path]:
    """Reads a LoRA file strictly and writes our parameters; returns the files written."""
    lora = read(path, layout, options)
    specs = {
        f"adapter/{p}": s._replace(dtype=np.dtype(dtype)) if dtype else s
        for p, s in lora.specs.items()
    }
    config = {"adapter": dataclasses.asdict(lora.config)}
    about = {"format": layout.name, "config": config, "source": str(path)}
    about["meta"] = {"config": config}
    if prints := recorded(open_weights(path).metadata, path):
        about["meta"]["fingerprints"] = prints
    files = native.write(out, about, specs, lambda p: lora.read(p.removeprefix("adapter/")))
    report(layout, lora)
    return files


def recorded(metadata: Mapping[str, str], where: Path) -> dict[str, str]:
    """Fingerprints, by part, of the frozen weights that a LoRA of ours was trained on.

    Args:
      metadata: of the file's header; what other trainers write says nothing of them.
      where: the file, for the error.

    Raises:
      WeightsError: something else under that key.
    """
    if metadata.get("software") != "x2jax" or "fingerprints" not in metadata:
        return {}
    try:
        found = json.loads(metadata["fingerprints"])
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(x, str) for x in found.values()):
        what = ascii(metadata["fingerprints"])[:200]
        raise WeightsError(f"LoRA {where}", [f"fingerprints in its header are damaged: {what}"])
    return found


def inspect(path: Path, layout: Layout, options: Options) -> None:
    """Prints what a LoRA file is."""
    tensors = open_weights(path)
    kinds = sorted({str(x.dtype) for x in tensors.values()})
    print(f"  {len(tensors):,} tensors, {', '.join(kinds)}")
    for key, value in tensors.metadata.items():
        print(f"  {key}: {value[:200]}")
    report(layout, read(path, layout, options))


def report(layout: Layout, lora: Lora) -> None:
    """Prints what a file gave, and what it did not."""
    count = sum(int(np.prod(s.shape)) for s in lora.specs.values())
    print(f"{layout.name}: rank {lora.config.rank}, {len(lora.specs)} arrays, {count:,} parameters")
    for note in lora.notes:
        print(f"  {note}")
    if lora.ignored:
        print(f"  left out: {', '.join(lora.ignored)}")


def is_plain(params: Iterable[str]) -> bool:
    """Whether a trained tree holds plain LoRA: an adapter that does not route."""
    own = [p for p in params if p.startswith("adapter/")]
    return bool(own) and not any(p.endswith(("/gate_x", "/task_table/embedding")) for p in own)


def export(
    params: Mapping[str, Any], meta: Mapping[str, Any], out: Path, dtype: str | None = None
) -> list[Path]:
    """Writes plain LoRA as one PEFT file, with where it came from in the header.

    Args:
      params: trained tree by path; only `adapter/` may be in it.
      meta: at least `config`; of a run also `step` and `fingerprints`.
      out: folder.
      dtype: of the tensors; None keeps the parameters' own.

    Raises:
      WeightsError: something that is no plain LoRA; every offender is listed.
    """
    fields = {f.name for f in dataclasses.fields(AdapterConfig)} | {"preset"}
    cfg = AdapterConfig.of({k: v for k, v in meta["config"]["adapter"].items() if k in fields})
    own = child(dict(params), "adapter")
    lost = [f"no place: {p} {x.shape}" for p, x in params.items() if not p.startswith("adapter/")]
    if cfg.series:
        lost.append(f"series adapters {cfg.series}: plain LoRA adds to its projection in parallel")
    if lost:
        raise WeightsError("export as lora-peft", lost)
    sizes = _sizes(own)
    specs, read_one = lora_peft.exporter(own, sizes, cfg.scale, dtype)
    header = {"rank": str(cfg.rank), "alpha": str(cfg.rank), "software": "x2jax"}
    header |= {k: meta[k] for k in ("step", "fingerprints", "config") if k in meta}
    header = {k: v if isinstance(v, str) else json.dumps(v, default=str) for k, v in header.items()}
    return safetensors_io.write(out / lora_peft.FILE, specs, read_one, metadata=header)


def _sizes(params: Mapping[str, Any]) -> Sizes:
    """The FLUX of an adapter, from its shapes."""

    def blocks(kind: str) -> int:
        return max((len(x) for p, x in params.items() if p.startswith(kind)), default=0)

    downs = {p: x.shape[1] for p, x in params.items() if p.endswith("/down")}
    width = next((n // (4 if p.endswith("mlp_out/down") else 1) for p, n in downs.items()), 0)
    return Sizes(blocks("double_blocks/"), blocks("single_blocks/"), width)
