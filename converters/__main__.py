"""Weights between PyTorch's formats and ours: `python -m converters import|export|inspect`.

import   a published folder or file -> our parameters by path, checked as a whole
export   a training run, or what import wrote -> the files that others read
inspect  what a file or folder is, what is in it, and what is wrong with it
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters import formats, native, pickles, safetensors_io, x2edit
from converters.formats import FORMATS, Format
from converters.load import exporter, importer, open_weights
from converters.rules import WeightsError
from x2jax import trained
from x2jax.trees import child

DTYPES = ("float32", "bfloat16", "float16")


def import_(source: Path, fmt: Format, out: Path, dtype: str | None = None) -> list[Path]:
    """Reads a format strictly and writes our parameters; returns the files written.

    Raises:
      FileNotFoundError, ImportError, ValueError: as `open_weights` and `WeightsError` say.
    """
    config = fmt.read(source)
    specs, readers, ignored = {}, {}, []
    for part, (entries, read, left_out) in _open_parts(source, fmt, config):
        head = f"{part.prefix}/" if part.prefix else ""
        for path, spec in entries.items():
            specs[head + path] = spec._replace(dtype=np.dtype(dtype)) if dtype else spec
            readers[head + path] = (read, path)
        ignored += left_out
    about = {"format": fmt.name, "config": config, "source": str(source)}
    if fmt.name == "x2edit":
        about["meta"] = trained.trio_meta(source, config)

    def read_one(path: str) -> np.ndarray:
        read, name = readers[path]
        return read(name)

    files = native.write(out, about, specs, read_one)
    if ignored:
        print(f"left out, known and not needed: {_some(ignored)}")
    return files


def _open_parts(source: Path, fmt: Format, config: Mapping[str, Any]):
    """Every part with what it will give; the offenders of all files are reported together."""
    found, problems = [], []
    for part in fmt.parts(config):
        try:
            found.append((part, importer(fmt.locate(source, part), part.table, part.shapes)))
        except WeightsError as e:
            problems += [f"{part.file}: {p}" for p in e.problems]
    if problems:
        raise WeightsError(f"{fmt.name} in {source}", problems)
    return found


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
    fmt = fmt or FORMATS[about["format"]]
    if fmt.name != about["format"]:
        raise ValueError(
            f"{source} holds {about['format']} weights: they cannot be written as {fmt.name}"
        )
    if fmt.name != "x2edit":
        params, config = native.open_folder(source)[0], about["config"]
        return _write(fmt, config, params, out, dtype)
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
    files = _write(fmt, formats.x2edit_config(params), params, out, dtype)
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


def _write(fmt: Format, config, params, out: Path, dtype: str | None) -> list[Path]:
    plans = []
    for part in fmt.parts(config):
        own = child(params, part.prefix) if part.prefix else dict(params)
        mine = {p: own[p] for p in part.shapes if p in own}
        plans.append((part, exporter(mine, part.table, dtype or part.dtype)))
    placed = {p for part in fmt.parts(config) for p in formats.whole(part)}
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
    other = Path(formats.twin(str(path)))
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


def inspect(path: Path, fmt: Format | None = None) -> bool:
    """Prints what a file or folder is; False if something is wrong with it."""
    if native.is_native(path):
        tensors, about = native.open_folder(path)
        print(f"{path}: our parameters, imported as {about['format']} from {about.get('source')}")
        _summary(tensors)
        return True
    try:
        fmt = fmt or formats.detect(path)
    except WeightsError:
        tensors = open_weights(path)
        print(f"{path}: tensors of no format known here")
        _summary(tensors)
        print(f"known formats:\n{_formats()}")
        return False
    print(f"{path}: {fmt.name}, {fmt.what}")
    config = fmt.read(path)
    print(json.dumps(config, indent=2))
    parts = fmt.parts(config)
    for part in parts:
        file = fmt.locate(path, part)
        print(f"{file.name}:")
        _summary(open_weights(file))
    for part, (specs, _, ignored) in _open_parts(path, fmt, config):
        count = sum(int(np.prod(s.shape)) for s in specs.values())
        print(f"{part.file}: complete; fills {len(specs)} arrays, {count:,} parameters")
        if ignored:
            print(f"  left out, known and not needed: {_some(ignored)}")
    return True


def _summary(tensors: Mapping[str, np.ndarray], shown: int = 6) -> None:
    count = sum(x.size for x in tensors.values())
    kinds = sorted({str(x.dtype) for x in tensors.values()})
    print(f"  {len(tensors):,} tensors, {count:,} parameters, {', '.join(kinds)}")
    for name, x in list(tensors.items())[:shown]:
        print(f"    {name} {tuple(x.shape)}")
    if len(tensors) > shown:
        print(f"    ... and {len(tensors) - shown:,} more")


def _some(names: Iterable[str], shown: int = 3) -> str:
    names = list(names)
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest


def _formats() -> str:
    return "\n".join(f"  {f.name:15} {f.what}" for f in FORMATS.values())


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; exits with usage where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m converters",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"formats:\n{_formats()}\n\nA file applies whole or is refused with every reason.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="import|export|inspect")
    kinds = dict(choices=list(FORMATS), help="default: what the files look like")

    read = commands.add_parser("import", help="published files -> our parameters")
    read.add_argument("--from", dest="source", type=Path, required=True, help="file or folder")
    read.add_argument("--out", type=Path, required=True, help="folder for our parameters")
    read.add_argument("--format", **kinds)
    read.add_argument("--dtype", choices=DTYPES, help="default: as in the file")

    write = commands.add_parser("export", help="a run, or imported parameters -> published files")
    write.add_argument(
        "--from", dest="source", type=Path, required=True, help="workdir of a run, or folder"
    )
    write.add_argument("--out", type=Path, required=True, help="folder for the files")
    write.add_argument("--format", choices=list(FORMATS), help="default: x2edit, or as imported")
    write.add_argument("--step", type=int, help="checkpoint of a run; default the newest")
    write.add_argument("--ema", action="store_true", help="the run's moving average")
    write.add_argument(
        "--dtype", choices=DTYPES, help="of all tensors; default: the format's own (LoRA bfloat16)"
    )

    look = commands.add_parser("inspect", help="what a file is and what is wrong with it")
    look.add_argument("source", type=Path, help="file or folder")
    look.add_argument("--format", **kinds)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        if not args.source.exists():
            raise FileNotFoundError(f"no such file or folder: {args.source}")
        fmt = FORMATS[args.format] if args.format else None
        if args.command == "inspect":
            return 0 if inspect(args.source, fmt) else 1
        if args.command == "import":
            fmt = fmt or formats.detect(args.source)
            files = import_(args.source, fmt, args.out, args.dtype)
        else:
            files = export(
                args.source, fmt, args.out, step=args.step, ema=args.ema, dtype=args.dtype
            )
    except (OSError, ValueError, ImportError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    for file in files:
        print(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
