"""Weights between PyTorch's formats and ours: `python -m converters import|export|inspect`.

import   a published folder or file -> our parameters by path, checked as a whole
export   a run, what import wrote, or another published file -> the files that others read
inspect  what a file or folder is, what is in it, and what is wrong with it
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import jax

from converters import bundle, formats, lora_files, native
from converters.bundle import Bundle
from converters.exporting import export
from converters.formats import FORMATS
from converters.importing import import_
from converters.inspecting import inspect, known_formats
from converters.lora_names import LAYOUTS, Layout
from converters.verify import check_hashes
from x2jax.sources import read_json

PLAIN = "lora-peft"
DTYPES = ("float32", "bfloat16", "float16")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; exits with usage where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m converters",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"formats:\n{known_formats()}\n\nA file applies whole or is refused, with reasons.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="import|export|inspect")
    kinds = dict(choices=[*FORMATS, *LAYOUTS], help="default: what the files look like")
    of_lora = argparse.ArgumentParser(add_help=False)
    of_lora.add_argument(
        "--flux", default="", help="of a LoRA: diffusers folder of its FLUX; default FLUX.1's sizes"
    )
    of_lora.add_argument(
        "--ignore",
        nargs="+",
        default=[],
        metavar="REGEX",
        help="of a LoRA: names to leave out and report",
    )
    given = dict(type=Path, metavar="FILE", help="config.json; default: what the files say")

    read = commands.add_parser(
        "import", help="published files -> our parameters", parents=[of_lora]
    )
    read.add_argument("--from", dest="source", type=Path, required=True, help="file or folder")
    read.add_argument("--out", type=Path, required=True, help="folder for our parameters")
    read.add_argument("--format", **kinds)
    read.add_argument("--config", **given)
    read.add_argument("--dtype", choices=DTYPES, help="default: as in the file")
    read.add_argument("--verify", action="store_true", help="check the recorded hashes first")

    write = commands.add_parser("export", help="a run, or imported parameters -> published files")
    write.add_argument(
        "--from", dest="source", type=Path, required=True, help="workdir of a run, or weights"
    )
    write.add_argument("--out", type=Path, required=True, help="folder for the files")
    write.add_argument(
        "--format",
        choices=[*FORMATS, PLAIN, bundle.NAME],
        help=f"default: as imported; of a run, {PLAIN} for plain LoRA, x2edit otherwise",
    )
    write.add_argument("--config", **given)
    write.add_argument("--step", type=int, help="checkpoint of a run; default the newest")
    write.add_argument("--ema", action="store_true", help="the run's moving average")
    write.add_argument(
        "--merge", type=Path, metavar="RUN", help="add the plain LoRA of this run or file"
    )
    write.add_argument("--scale", type=float, default=1.0, help="strength of the merged LoRA")
    write.add_argument(
        "--any-base", action="store_true", help="merge a LoRA that was trained on another base"
    )
    write.add_argument(
        "--dtype", choices=DTYPES, help="of all tensors; default: the format's own (LoRA bfloat16)"
    )

    look = commands.add_parser(
        "inspect", help="what a file is and what is wrong with it", parents=[of_lora]
    )
    look.add_argument("source", type=Path, help="file or folder")
    look.add_argument("--format", **kinds)
    look.add_argument("--config", **given)
    look.add_argument("--verify", action="store_true", help="check the recorded hashes")
    look.add_argument("--all", action="store_true", help="every tensor, and where it goes")
    return parser.parse_args(argv)


def _read(args: argparse.Namespace, config: Any) -> list[Path] | None:
    """Imports or inspects; returns the files written, None if something is wrong with them."""
    options = lora_files.Options(args.flux, tuple(args.ignore))
    layout = LAYOUTS.get(args.format)
    if args.format is None and not native.is_native(args.source):
        layout = lora_files.detect(args.source)
    if layout is None and options != lora_files.Options():
        raise ValueError(f"--flux and --ignore are for LoRA files, and {args.source} is none")
    if layout is not None:
        return _read_lora(args, layout, options)
    fmt = FORMATS[args.format] if args.format else None
    if args.command == "inspect":
        good = inspect(args.source, fmt, config, verify=args.verify, all_names=args.all)
        return [] if good else None
    fmt = fmt or formats.detect(args.source)
    print(f"{args.source}: {fmt.name}, {fmt.what}")
    return import_(args.source, fmt, args.out, args.dtype, config, verify=args.verify)


def _read_lora(args: argparse.Namespace, layout: Layout, options: lora_files.Options):
    if args.verify:
        check_hashes(args.source)
    print(f"{args.source}: {layout.name}, {layout.what}")
    if args.command == "inspect":
        lora_files.inspect(args.source, layout, options)
        return []
    return lora_files.import_(args.source, layout, args.out, options, args.dtype)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        if not args.source.exists():
            raise FileNotFoundError(f"no such file or folder: {args.source}")
        config = read_json(args.config) if args.config else None
        if args.command != "export":
            files = _read(args, config)
        else:
            own = ("step", "ema", "dtype", "merge", "scale", "any_base")
            options = {k: getattr(args, k) for k in own}
            known = {**FORMATS, **LAYOUTS, bundle.NAME: Bundle()}
            fmt = known[args.format] if args.format else None
            files = export(args.source, fmt, args.out, config=config, **options)
    except (OSError, ValueError, ImportError) as e:
        print("\n".join([f"error: {e}", *getattr(e, "__notes__", ())]), file=sys.stderr)
        return 1
    if files is None:
        return 1
    for file in files:
        print(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    # A conversion is host work: it must not take the accelerator from a run.
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main())
