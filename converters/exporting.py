"""Our parameters, of a run or imported, or another published file -> the files that others read."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from converters import bundle, formats, lora_files, native, pickles, safetensors_io
from converters.bundle import Bundle
from converters.formats import FORMATS, Format, Part
from converters.formats.base import twin
from converters.formats.x2edit import x2edit_config
from converters.importing import identity, open_parts
from converters.load import Imported
from converters.lora_names import Layout
from converters.merging import Merged, check_base, merge_note, open_adapter
from converters.rules import WeightsError
from converters.save import Exported, Held, Parameters
from converters.trained_parts import PARTS, part_of
from x2jax import trained
from x2jax.flux import FluxConfig
from x2jax.trees import child

Source = Parameters | Mapping[str, Any]


class Base(NamedTuple):
    """Frozen weights to export.

    Attributes:
      fmt: what they were read as.
      config: of the model.
      params: by our path.
      name: of where they came from, without folders.
    """

    fmt: Format
    config: Mapping[str, Any]
    params: Parameters
    name: str


def export(
    source: Path,
    fmt: Format | Layout | Bundle | None,
    out: Path,
    *,
    step: int | None = None,
    ema: bool = False,
    dtype: str | None = None,
    merge: Path | None = None,
    scale: float = 1.0,
    any_base: bool = False,
    config: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Writes weights in a format; returns the files written.

    Args:
      source: workdir of a run; a folder that `import_` wrote; or files in any format known.
      fmt: None for the format that an imported folder came from; for a run and an imported LoRA,
        lora-peft where it is plain LoRA and x2edit otherwise.
      out: folder.
      step, ema: of a run, as `x2jax.trained.open_trained`; with `merge`, of that run.
      dtype: of all tensors; None for the format's own.
      merge: a run, an imported LoRA, or a LoRA file, which is added to the weights.
      scale: what its deltas are multiplied with.
      any_base: merge although it was trained on another base; says so.
      config: of the model; None for what the files say.

    Raises:
      FileNotFoundError, ValueError: nothing to export there, or parameters that the format lacks.
    """
    base = _open_base(source, config)
    if base is None:
        if merge is not None:
            raise ValueError(f"--merge needs a base in --from; {source} is a trained adapter")
        found = trained.open_trained(source, step, ema=ema)
        if isinstance(fmt, Format) and fmt.kind in PARTS:
            return write(fmt, *part_of(found, fmt, source), out, dtype)
        plain = lora_files.is_plain(found.params)
        fits = ("lora-peft",) if plain else ("x2edit", bundle.NAME)
        if fmt is not None and fmt.name not in fits:
            raise ValueError(
                f"{source} is a trained adapter: it cannot be written as {fmt.name}, only as "
                f"{' or '.join(fits)}"
            )
        if plain:
            return lora_files.export(found.params, found.meta, out, dtype)
        return _export_trained(found, out, dtype, isinstance(fmt, Bundle))
    fmt = base.fmt if fmt is None else fmt
    if not isinstance(fmt, Format) or fmt.kind != base.fmt.kind:
        others = ", ".join(f.name for f in FORMATS.values() if f.kind == base.fmt.kind)
        raise ValueError(
            f"{source} holds {base.fmt.name} weights: they cannot be written as {fmt.name}, "
            f"only as {others}"
        )
    params, about, resume = base.params, {"from": base.name}, identity(source)
    if merge is None and (step is not None or ema):
        raise ValueError(f"{source} is not a run: it has neither steps nor a moving average")
    if merge is not None:
        if fmt.kind != "flux":
            raise ValueError(f"--merge adds a LoRA to a FLUX.1; {source} holds {fmt.kind} weights")
        found = open_adapter(merge, FluxConfig.from_diffusers(base.config), step, ema=ema)
        params = Merged(base.params, found.params, found.meta["config"]["adapter"], scale)
        check_base(found.meta, base.params, merge, source, any_base)
        about["merged"] = merge_note(found.meta, scale)
        resume += json.dumps(about, default=str)
        if any(not p.startswith("adapter/") for p in found.params):
            print(f"left out: what {merge} trained besides its LoRA has no place in a FLUX.1")
    return write(fmt, base.config, params, out, dtype, {"x2jax": about}, resume)


def _open_base(source: Path, config: Mapping[str, Any] | None) -> Base | None:
    """The frozen weights of a source; None if it is a run, or an adapter."""
    if native.is_native(source):
        tensors, about = native.open_folder(source)
        if "meta" in about:
            return None
        name = Path(about.get("source", source)).name
        return Base(FORMATS[about["format"]], about["config"], Held(tensors), name)
    if (source / "checkpoints").is_dir() or source.name == "checkpoints":
        return None
    own = formats.detect(source)
    if own.name == "x2edit":
        return None
    config = own.read(source) if config is None else config
    ((_, found),) = open_parts(source, own, config)
    return Base(own, config, found, source.name)


def _export_trained(
    found: trained.Trained, out: Path, dtype: str | None, bundled: bool
) -> list[Path]:
    params = dict(found.params)
    if not any(p.startswith("alignnet/") for p in params):
        params |= _alignnet_of(found.meta)
    adapter = found.meta["config"]["adapter"]
    scale = (adapter.get("alpha") or adapter["rank"]) / adapter["rank"]
    if scale != 1:
        print(f"the format has no alpha: alpha / rank = {scale:g} goes into the up projections")
        ups = [p for p in params if p.startswith("adapter/") and p.endswith("/up")]
        params |= {p: np.asarray(params[p], np.float32) * np.float32(scale) for p in ups}
    config, trio = x2edit_config(params), FORMATS["x2edit"]
    content = bundle.settings(config, found.meta) if bundled else {}
    if bundled:
        trio = dataclasses.replace(trio, parts=_as_safetensors)
    files = write(trio, config, params, out, dtype)
    sidecar = out / trained.SIDECAR
    hashes = {f.name: safetensors_io.file_sha256(f) for f in files}
    meta = {**found.meta, "sha256": hashes}
    sidecar.write_text(json.dumps(meta, indent=2, default=str) + "\n")
    return [*files, sidecar, *(bundle.write(out, content) if bundled else ())]


def _as_safetensors(config: Mapping[str, Any]) -> list[Part]:
    parts = FORMATS["x2edit"].parts(config)
    return [dataclasses.replace(part, file=twin(part.file)) for part in parts]


def _alignnet_of(meta: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The AlignNet that a run used and did not train, from where it had it."""
    from x2jax import sources

    path = sources.folder(meta["config"]["alignnet"], "alignnet", "alignnet")
    fmt = FORMATS["alignnet"]
    (part,) = fmt.parts(fmt.read(path))
    read = Imported(path, part.table, part.shapes)
    return {f"alignnet/{p}": read(p) for p in read.specs}


def write(
    fmt: Format,
    config: Mapping[str, Any],
    params: Source,
    out: Path,
    dtype: str | None = None,
    about: Mapping[str, Any] | None = None,
    resume: str | None = None,
) -> list[Path]:
    """Writes parameters as the files of a format; returns the files.

    Args:
      fmt: the format.
      config: of the model.
      params: by our path; of a format with several files, a mapping.
      out: folder.
      dtype: of all tensors; None for the format's own.
      about: for the header of files that have one.
      resume: as `safetensors_io.write` takes it.

    Raises:
      WeightsError: parameters that the format has no place for, or that it lacks.
    """
    parts, plans, problems = fmt.parts(config), [], []
    for part in parts:
        try:
            plans.append((part, Exported(_of(part, params), part.table, dtype or part.dtype)))
        except WeightsError as e:
            problems += e.problems
    placed = {p for part in parts for p in part.whole()}
    specs = Held(params).specs if isinstance(params, Mapping) else params.specs
    problems += [f"no place for {p} {s.shape}" for p, s in specs.items() if p not in placed]
    if problems:
        raise WeightsError(f"export as {fmt.name}", problems)
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for part, found in plans:
        files += _write_part(out / part.file, part, found, about or {}, resume)
    if fmt.has_config:
        path = out / "config.json"
        public = {k: v for k, v in config.items() if not k.startswith("x2jax_")}
        path.write_text(json.dumps(public, indent=2) + "\n")
        files.append(path)
    return files


def _of(part: Part, params: Source) -> Source:
    if not isinstance(params, Mapping):
        return params
    own = child(dict(params), part.prefix) if part.prefix else params
    return {p: own[p] for p in part.shapes if p in own}


def _write_part(
    path: Path, part: Part, found: Exported, about: Mapping[str, Any], resume: str | None
) -> list[Path]:
    metadata = None if part.metadata is None else {**part.metadata, **about}
    options = dict(metadata=metadata, max_shard=part.max_shard, resume=resume)
    if path.suffix not in pickles.SUFFIXES:
        return safetensors_io.write(path, found.specs, found.chunks, **options)
    other = Path(twin(str(path)))
    if pickles.have_torch():
        pickles.write(path, {name: found(name) for name in found.specs}, part.beside)
        other.unlink(missing_ok=True)
        return [path]
    if part.beside is not None:
        raise ImportError(
            f"{path.name} is a pickle that holds more than tensors, and torch is not installed: "
            "pip install 'x2jax[torch]'"
        )
    print(
        f"torch is not installed: wrote {other.name} instead of {path.name}. "
        "For the pickle that X2Edit's own scripts read: pip install 'x2jax[torch]', export again"
    )
    path.unlink(missing_ok=True)
    return safetensors_io.write(other, found.specs, found.chunks, **options)
