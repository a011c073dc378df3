"""Pictures to bucket-sized uint8 RGB: modes, the choice of a bucket, resize and crop."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

Bucket = tuple[int, int]
"""(width, height) in pixels."""

_WIDTHS = (720, 752, 784, 832, 880, 944, 1024, 1104, 1184, 1248, 1312, 1392, 1456)
BUCKETS_512: tuple[Bucket, ...] = ((512, 512),)
BUCKETS_1024: tuple[Bucket, ...] = tuple(zip(_WIDTHS, reversed(_WIDTHS), strict=True))
"""The 13 aspect ratios of the 1024 px stage, by rising width; at most 4096 packed tokens each."""

_TINY = ((5, 12), (5, 11), (6, 10), (6, 9), (7, 9), (7, 8), (8, 8))
BUCKETS_TINY: tuple[Bucket, ...] = ((64, 64),)
BUCKETS_TINY_MIXED: tuple[Bucket, ...] = tuple((8 * w, 8 * h) for w, h in _TINY) + tuple(
    (8 * h, 8 * w) for w, h in reversed(_TINY[:-1])
)
"""As BUCKETS_1024, at 8 px a token and at most 64 tokens."""

MODES = ("RGB", "L", "P", "CMYK", "RGBA")


class BadImage(ValueError):
    """A picture that cannot be used; the message is the reason."""


def canvas_size(buckets: Sequence[Bucket]) -> tuple[int, int]:
    """(height, width) of the smallest canvas that holds every bucket."""
    return max(h for _, h in buckets), max(w for w, _ in buckets)


def nearest_bucket(width: int, height: int, buckets: Sequence[Bucket]) -> Bucket:
    """The bucket of the nearest aspect ratio, by log ratio; the first one on a tie."""
    aspect = math.log(width / height)
    return min(buckets, key=lambda b: abs(math.log(b[0] / b[1]) - aspect))


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of a picture; transparency is laid over white.

    Raises:
      BadImage: a mode other than MODES, such as 16-bit or bilevel.
    """
    if image.mode not in MODES:
        raise BadImage(f"image mode {image.mode}")
    if image.mode == "RGB":
        return image
    if image.mode == "RGBA" or (image.mode == "P" and "transparency" in image.info):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def resize_crop(image: Image.Image, bucket: Bucket) -> Image.Image:
    """Centre crop of the bucket's aspect ratio, resized to the bucket (Lanczos)."""
    width, height = bucket
    scale = max(width / image.width, height / image.height)
    w, h = min(width / scale, image.width), min(height / scale, image.height)
    left, top = (image.width - w) / 2, (image.height - h) / 2
    # The same picture as resizing all of it and cropping then, without computing what is cut off.
    box = (left, top, left + w, top + h)
    return image.resize(bucket, Image.Resampling.LANCZOS, box=box)


def decode(data: bytes) -> Image.Image:
    """RGB picture of an encoded file.

    Raises:
      BadImage: it cannot be decoded to the end, or its mode is refused.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return to_rgb(image)
    except BadImage:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise BadImage(f"cannot decode: {_short(e)}") from None


def header_size(data: bytes) -> tuple[int, int]:
    """(width, height) from an image file's header.

    Raises:
      BadImage: no image header.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise BadImage(f"no image header: {_short(e)}") from None


def _short(e: Exception) -> str:
    # PIL adds addresses and byte counts, which would make every file a reason of its own.
    return str(e).split("<_io")[0].split("(")[0].strip()


def place(image: Image.Image, bucket: Bucket, out: UInt8[np.ndarray, "Hc Wc 3"]) -> None:
    """Writes a picture, fitted to `bucket`, at the top left of a canvas."""
    width, height = bucket
    out[:height, :width] = np.asarray(resize_crop(image, bucket))
