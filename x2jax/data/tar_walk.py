"""Members of a tar file by its headers alone, through concatenations and up to a cut."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = 512
_SCAN = 1 << 20


class Member(NamedTuple):
    """A regular file in a tar.

    Attributes:
      name: path inside the tar.
      offset: of its first byte in the tar file.
      size: in bytes.
      run: rises at zero blocks and damage; members of one sample share it.
    """

    name: str
    offset: int
    size: int
    run: int


def walk(file: BinaryIO, problems: list[str]) -> Iterator[Member]:
    """Yields the whole members of an open tar file in file order.

    Zero blocks do not end it, because shards are often concatenations of tars; a member that
    reaches beyond the end of the file does. Directories and links are passed over.

    Args:
      file: seekable, at any position.
      problems: what is wrong with the file is appended here, in words.
    """
    end = file.seek(0, os.SEEK_END)
    at, run, zeros, long_name, long_size = 0, 0, False, "", None
    while at + BLOCK <= end:
        file.seek(at)
        header = file.read(BLOCK)
        if not header.strip(b"\0"):
            run, zeros, at = run + (not zeros), True, at + BLOCK
            continue
        if not _valid(header):
            following = _resync(file, at + BLOCK, end)
            problems.append(
                f"no tar header at byte {at}; "
                + (
                    f"went on at byte {following}"
                    if following < end
                    else "nothing after it is used"
                )
            )
            run, at, long_name, long_size = run + 1, following, "", None
            # The file does not stop early; it is damaged, and that has been said.
            zeros = True
            continue
        zeros = False
        size = _number(header[124:136]) if long_size is None else long_size
        data, kind = at + BLOCK, header[156:157]
        if data + size > end:
            problems.append(
                f"truncated: member {long_name or _name(header)!r} at byte {at} needs {size} "
                f"bytes, {end - data} are there"
            )
            return
        at = data + -(-size // BLOCK) * BLOCK
        if kind in (b"x", b"L"):
            file.seek(data)
            payload = file.read(size)
            if kind == b"L":
                long_name = payload.rstrip(b"\0").decode("utf-8", "replace")
            else:
                records = _pax(payload)
                long_name = records.get("path", long_name)
                long_size = int(records["size"]) if "size" in records else None
            continue
        if kind in (b"g", b"K"):
            continue
        if kind in (b"0", b"\0", b"7"):
            yield Member(long_name or _name(header), data, size, run)
        elif kind not in (b"1", b"2", b"5"):
            problems.append(f"member {_name(header)!r} of kind {kind!r} is not used")
        long_name, long_size = "", None
    if end == 0:
        problems.append("empty file")
    elif not zeros:
        problems.append(f"truncated: no end-of-archive block at byte {at}")


def _valid(header: bytes) -> bool:
    try:
        stored = int(header[148:156].strip(b" \0") or b"x", 8)
    except ValueError:
        return False
    return stored == sum(header[:148]) + 8 * 32 + sum(header[156:])


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU base 256, for members of 8 GiB and more
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return int(field.strip(b" \0") or b"0", 8)


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "replace")


def _pax(payload: bytes) -> dict[str, str]:
    """Records "LENGTH KEY=VALUE\\n" of an extended header."""
    out, at = {}, 0
    while at < len(payload):
        length, _, _ = payload[at:].partition(b" ")
        if not length.isdigit() or int(length) < 4:
            break
        record = payload[at + len(length) + 1 : at + int(length) - 1]
        key, _, value = record.partition(b"=")
        out[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        at += int(length)
    return out


def _resync(file: BinaryIO, at: int, end: int) -> int:
    """Byte of the next valid header on the block grid of the file, or `end`."""
    while at + BLOCK <= end:
        file.seek(at)
        chunk = file.read(_SCAN)
        found = chunk.find(b"ustar")
        while found >= 0:
            start = found - 257
            whole = start % BLOCK == 0 and start >= 0 and start + BLOCK <= len(chunk)
            if whole and _valid(chunk[start : start + BLOCK]):
                return at + start
            found = chunk.find(b"ustar", found + 1)
        at += _SCAN
    return end
