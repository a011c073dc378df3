"""Handmade shards: small tars written block by block, sound or damaged on purpose."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

END = bytes(1024)


def header(name: str, size: int, kind: bytes = b"0") -> bytes:
    block = bytearray(512)
    block[: len(name)] = name.encode()
    block[100:108] = b"0000644\0"
    block[124:136] = f"{size:011o}\0".encode()
    block[136:148] = b"00000000000\0"
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


def member(name: str, data: bytes, kind: bytes = b"0") -> bytes:
    return header(name, len(data), kind) + data + bytes(-len(data) % 512)


def picture(
    width: int = 64, height: int = 64, value: int = 100, mode: str = "RGB", form: str = "JPEG"
) -> bytes:
    out = io.BytesIO()
    shape = (height, width) if mode in ("L", "P") else (height, width, len(mode))
    if mode == "I;16":
        image = Image.fromarray(np.full((height, width), 1000, np.uint16))
    else:
        image = Image.fromarray(np.full((height, width, 3), value, np.uint8)).convert(mode)
    assert image.size == shape[1::-1]
    image.save(out, form)
    return out.getvalue()


def broken() -> bytes:
    """A JPEG with a sound header that ends half way."""
    out = io.BytesIO()
    x = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(x).save(out, "JPEG")
    return out.getvalue()[: out.tell() // 2]


def sample(
    stem: str,
    task: str = "add",
    instruction: str | None = "add a cat",
    target: bytes | None = None,
    source: bytes | None = None,
    names: tuple[str, str] = ("1.0.jpg", "2.jpg"),
    **record,
) -> bytes:
    fields = {"task": task, **record}
    if instruction is not None:
        fields["instruction"] = instruction
    parts = {
        names[0]: picture(value=50) if source is None else source,
        names[1]: picture() if target is None else target,
        "json": json.dumps(fields).encode(),
        "txt": b"text",
    }
    return b"".join(member(f"{stem}.{k}", v) for k, v in parts.items())


def write(path: Path, *parts: bytes, end: bytes = END) -> str:
    path.write_bytes(b"".join(parts) + end)
    return str(path)


def tokenize(texts: list[str]):
    ids = np.zeros((len(texts), 8), np.int32)
    for row, text in zip(ids, texts, strict=True):
        codes = [ord(c) for c in text][:8]
        row[8 - len(codes) :] = codes
    return ids, ids > 0
