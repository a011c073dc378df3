"""Weights between PyTorch's formats and ours: `python -m converters import|export|inspect`.

import   a published folder or file -> our parameters by path, checked as a whole
export   a training run, or what import wrote -> the files that others read
inspect  what a file or folder is, what is in it, and what is wrong with it
"""

import argparse
import sys
from pathlib import Path

from converters import formats
from converters.exporting import export
from converters.formats import FORMATS
from converters.importing import import_
from converters.inspecting import inspect, known_formats

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
