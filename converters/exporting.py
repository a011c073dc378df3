"""Our parameters, of a run or imported -> the files that others read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters import native, pickles, safetensors_io, x2edit
from converters.formats import FORMATS, Format
from converters.formats.base import twin
from converters.formats.x2edit import x2edit_config
from converters.load import exporter, importer
from converters.rules import WeightsError
from x2jax import trained
from x2jax.trees import child


def export(
    source: Path,
    fmt: Format | None,
    out: Path,
    *,
    step: int | None = None,
    ema: bool = False,
    dtype: str | None = None,
) -> list[Path]:
    """Writes what a run trained, or what import wrote, in a format; returns the files written.

    Args:
      source: workdir of a run, or a folder that `import_` wrote.
      fmt: None for the format that an imported folder came from; x2edit for a run.
      out: folder.
      step, ema: of a run, as `x2jax.trained.open_trained`.
      dtype: of all tensors; None for the format's own.

    Raises:
      FileNotFoundError, ValueError: nothing to export there, or parameters that the format lacks.
    """
    about = native.open_folder(source)[1] if native.is_native(source) else {"format": "x2edit"}
    fmt = FORMATS[about["format"]] if fmt is None else fmt
    if fmt.name != about["format"]:
        raise ValueError(
            f"{source} holds {about['format']} weights: they cannot be written as {fmt.name}"
        )
    if fmt.name != "x2edit":
        params, config = native.open_folder(source)[0], about["config"]
        return write(fmt, config, params, out, dtype)
    found = trained.open_trained(source, step, ema=ema)
    params = dict(found.params)
    if not any(p.startswith("alignnet/") for p in params):
        params |= _alignnet_of(found.meta)
    adapter = found.meta["config"]["adapter"]
    scale = (adapter.get("alpha") or adapter["rank"]) / adapter["rank"]
    if scale != 1:
        print(f"the format has no alpha: alpha / rank = {scale:g} goes into the up projections")
        ups = [p for p in params if p.startswith("adapter/") and p.endswith("/up")]
        params |= {p: np.asarray(params[p], np.float32) * np.float32(scale) for p in ups}
    files = write(fmt, x2edit_config(params), params, out, dtype)
    sidecar = out / trained.SIDECAR
    sidecar.write_text(json.dumps(found.meta, indent=2, default=str) + "\n")
    return [*files, sidecar]


def _alignnet_of(meta: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The AlignNet that a run used and did not train, from where it had it."""
    from x2jax import sources

    path = sources.folder(meta["config"]["alignnet"], "alignnet", "alignnet")
    fmt = FORMATS["alignnet"]
    (part,) = fmt.parts(fmt.read(path))
    specs, read, _ = importer(path, part.table, part.shapes)
    return {f"alignnet/{p}": read(p) for p in specs}


def write(
    fmt: Format, config: Mapping[str, Any], params: Mapping[str, Any], out: Path, dtype: str | None
) -> list[Path]:
    """Writes parameters as the files of a format; returns the files.

    Raises:
      WeightsError: parameters that the format has no place for, or that it lacks.
    """
    plans = []
    for part in fmt.parts(config):
        own = child(params, part.prefix) if part.prefix else dict(params)
        mine = {p: own[p] for p in part.shapes if p in own}
        plans.append((part, exporter(mine, part.table, dtype or part.dtype)))
    placed = {p for part in fmt.parts(config) for p in part.whole()}
    lost = [f"no place for {p} {tuple(params[p].shape)}" for p in params if p not in placed]
    if lost:
        raise WeightsError(f"export as {fmt.name}", lost)
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for part, (specs, read) in plans:
        files += _write_part(out / part.file, specs, read)
    if fmt.has_config:
        path = out / "config.json"
        public = {k: v for k, v in config.items() if not k.startswith("x2jax_")}
        path.write_text(json.dumps(public, indent=2) + "\n")
        files.append(path)
    return files


def _write_part(path: Path, specs, read) -> list[Path]:
    if path.suffix not in pickles.SUFFIXES:
        # X2Edit's adapter file has no header metadata.
        metadata = None if path.name == x2edit.LORA else safetensors_io.PT
        return safetensors_io.write(path, specs, read, metadata=metadata)
    other = Path(twin(str(path)))
    if pickles.have_torch():
        pickles.write(path, {name: read(name) for name in specs})
        other.unlink(missing_ok=True)
        return [path]
    print(
        f"torch is not installed: wrote {other.name} instead of {path.name}. "
        "For the pickle that X2Edit's own scripts read: pip install 'x2jax[torch]', export again"
    )
    path.unlink(missing_ok=True)
    return safetensors_io.write(other, specs, read)
