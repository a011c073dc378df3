"""What a torch pickle may hold, checked before torch opens it: tensors by name, and plain values.

torch's weights-only loader runs no code, but believes the sizes that a file states: a few bytes can
ask it for terabytes. So the entries of the archive must fit into the file, and the pickle in it may
name nothing but tensors.
"""

import pickletools
import zipfile
from pathlib import Path

from converters.rules import WeightsError

MAX_ENTRIES = 200_000
MAX_PICKLE = 64 << 20
"""Bytes of the largest pickle of names and shapes."""
ALLOWED = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch Size",
    *(f"torch {kind}Storage" for kind in ("Float", "Double", "Half", "BFloat16")),
    *(f"torch {kind}Storage" for kind in ("Long", "Int", "Short", "Char", "Byte", "Bool")),
}


def check_pickle(path: Path) -> None:
    """Passes if a file is a torch archive that holds what it says, and nothing besides weights.

    Raises:
      WeightsError: every reason why not.
    """
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            problems = _entries(entries, size)
            if not problems:
                problems = _names(archive, entries)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError) as e:
        problems = [
            f"not the archive that torch.save writes since torch 1.6 ({ascii(str(e))[:120]}): "
            "truncated, another file, or an older pickle, which torch.load and torch.save renew"
        ]
    if problems:
        raise WeightsError(f"unreadable pickle {path}", problems)


def _entries(entries: list[zipfile.ZipInfo], size: int) -> list[str]:
    names = [e.filename for e in entries]
    problems = []
    if len(names) > MAX_ENTRIES or len(set(names)) < len(names):
        problems.append(f"{len(names)} entries, {len(set(names))} different ones")
    packed = [e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED]
    problems += [f"{ascii(n)[:80]} is compressed; torch stores what it saves" for n in packed[:5]]
    total = sum(e.file_size for e in entries)
    if total > size:
        problems.append(f"entries of {total} bytes in a file of {size}")
    pickles = [e for e in entries if e.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        problems.append(f"{len(pickles)} entries named data.pkl, expected one")
    elif pickles[0].file_size > MAX_PICKLE:
        problems.append(f"a pickle of {pickles[0].file_size} bytes (limit {MAX_PICKLE})")
    return problems


def _names(archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo]) -> list[str]:
    """What the pickle names besides tensors."""
    (entry,) = (e for e in entries if e.filename.endswith("/data.pkl"))
    found = set()
    try:
        for opcode, argument, _ in pickletools.genops(archive.read(entry)):
            if opcode.name in ("GLOBAL", "INST"):
                found.add(str(argument))
            elif opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
                found.add(opcode.name)
    except Exception as e:  # of a damaged pickle, pickletools raises whatever comes
        return [f"damaged: {type(e).__name__}: {ascii(str(e))[:120]}"]
    foreign = sorted(found - ALLOWED)
    return [f"it names {ascii(n)[:80]}: more than weights" for n in foreign[:10]]
