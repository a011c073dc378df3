"""Images and videos to patches, on the host, in numpy and PIL.

Equal, value for value, to transformers' `Qwen2VLImageProcessorPil`. Its torchvision twin, and its
video processor, resize with torch's bicubic kernel: that differs from PIL's by at most two levels
of 255 on a few values in a hundred (`tests/encoders/test_qwen_vision.py` bounds it).
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from x2jax.encoders.qwen2_5_vl.vision import VisionInputs
from x2jax.encoders.qwen2_5_vl.vision_config import VisionConfig

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
IMAGE_PIXELS = (56 * 56, 28 * 28 * 1280)
"""Fewest and most pixels of an image, as transformers has them by default. (Published
folders allow 12,845,056.)"""
VIDEO_PIXELS = (128 * 28 * 28, 768 * 28 * 28)
"""Fewest and most pixels of a frame of a video, as transformers has them."""
MAX_ASPECT = 200

Picture = Image.Image | UInt8[np.ndarray, "H W 3"]
Grid = tuple[int, int, int]


class Media(NamedTuple):
    """One image or video, ready for the tower.

    Attributes:
      kind: which of the two; its token in the prompt must agree.
      patches_PC: normalised pixels in transformers' order: frame by frame, token by token, and the
        2 x 2 patches of a token one after another.
      grid: (frames / temporal patch, rows, columns) of patches.
      seconds: of video that one step of the grid covers (`second_per_grid_t`); 0 for an image.
    """

    kind: Literal["image", "video"]
    patches_PC: Float[np.ndarray, "P C"]
    grid: Grid
    seconds: float = 0.0


def smart_resize(
    height: int, width: int, *, factor: int = 28, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Multiples of `factor` near (height, width) whose product lies in the range of pixels.

    Raises:
      ValueError: an empty image, an aspect ratio beyond 200, or an empty range.
    """
    if min(height, width) < 1:
        raise ValueError(f"an image of {width} x {height} pixels is empty: leave it out")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(
            f"an image of {width} x {height} pixels is narrower than 1:{MAX_ASPECT}; crop it"
        )
    if not 0 < min_pixels <= max_pixels:
        raise ValueError(f"min_pixels={min_pixels} must be in 1..max_pixels={max_pixels}")
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        rows = max(factor, math.floor(height / beta / factor) * factor)
        columns = max(factor, math.floor(width / beta / factor) * factor)
    elif rows * columns < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * beta / factor) * factor
        columns = math.ceil(width * beta / factor) * factor
    return rows, columns


def image_patches(
    image: Picture,
    cfg: VisionConfig,
    *,
    min_pixels: int = IMAGE_PIXELS[0],
    max_pixels: int = IMAGE_PIXELS[1],
    size: tuple[int, int] | None = None,
) -> Media:
    """Patches of one image; transparency is laid over white.

    Args:
      size: (height, width) that the image is brought to, multiples of `cfg.factor`, whatever its
        own; None for what `smart_resize` makes of it.

    Raises:
      ValueError: as `smart_resize`, or an array that is not uint8 of (height, width, 3).
    """
    rgb = _rgb(image)
    found = smart_resize(
        *rgb.shape[:2], factor=cfg.factor, min_pixels=min_pixels, max_pixels=max_pixels
    )
    size = found if size is None else size
    patches, grid = _patchify(_normalised([rgb], size), cfg)
    return Media("image", patches, grid)


def video_patches(
    frames: Sequence[Picture] | UInt8[np.ndarray, "F H W 3"],
    cfg: VisionConfig,
    *,
    fps: float,
    min_pixels: int = VIDEO_PIXELS[0],
    max_pixels: int = VIDEO_PIXELS[1],
    size: tuple[int, int] | None = None,
) -> Media:
    """Patches of one video; the last frame is repeated to fill a temporal patch.

    Args:
      frames: as sampled: all of them are used.
      fps: frames per second of `frames`, not of the file that they were sampled from.
      min_pixels, max_pixels: of a frame.
      size: of a frame, as `image_patches` has it.

    Raises:
      ValueError: no frames, frames of several sizes, no usable rate, or as `image_patches`.
    """
    if len(frames) == 0:
        raise ValueError("the video has no frames: give at least one, or leave the video out")
    if not (fps > 0 and math.isfinite(fps)):
        raise ValueError(f"fps={fps} must be positive: how many of these frames are a second?")
    rgb = [_rgb(f) for f in frames]
    if len({f.shape for f in rgb}) > 1:
        sizes = sorted({f"{f.shape[1]} x {f.shape[0]}" for f in rgb})
        raise ValueError(f"frames of one video differ in size ({', '.join(sizes)}): resize them")
    found = smart_resize(
        *rgb[0].shape[:2], factor=cfg.factor, min_pixels=min_pixels, max_pixels=max_pixels
    )
    size = found if size is None else size
    patches, grid = _patchify(_normalised(rgb, size), cfg)
    return Media("video", patches, grid, cfg.temporal_patch / fps)


def pack(batch: Sequence[Sequence[Media]], cfg: VisionConfig, budget: int) -> VisionInputs:
    """What the tower takes, padded to `budget` patches a sample (numpy arrays).

    Args:
      batch: per sample its images and videos, in the order of their tokens in the prompt.
      budget: patches a sample, a multiple of `merge ** 2`; one compiled program per budget.

    Raises:
      ValueError: a sample has more patches than the budget, or the budget is no such multiple.
    """
    unit = cfg.merge**2
    if budget < unit or budget % unit:
        raise ValueError(f"a budget of {budget} patches must be a positive multiple of {unit}")
    counts = [sum(len(m.patches_PC) for m in media) for media in batch]
    for b, count in enumerate(counts):
        if count > budget:
            raise ValueError(
                f"sample {b}: its {len(batch[b])} images and videos have {count} patches, the "
                f"budget is {budget}: lower max_pixels, give fewer, or raise the budget to {count}"
            )
    size = len(batch), budget
    out = VisionInputs(
        np.zeros((*size, cfg.patch_width), np.float32),
        np.zeros((*size, 2), np.int32),
        np.zeros(size, np.int32),
        np.zeros(size, np.int32),
        np.tile(np.arange(budget // unit, dtype=np.int32), (len(batch), 1)),
    )
    for b, (media, count) in enumerate(zip(batch, counts, strict=True)):
        if not count:
            continue
        patches = np.concatenate([m.patches_PC for m in media])
        positions = np.concatenate([patch_positions(m.grid, cfg) for m in media])
        frames, windows = segments([m.grid for m in media], cfg)
        order = np.argsort(windows, kind="stable")
        by_patch = (order[:, None] * unit + np.arange(unit)).reshape(-1)
        out.patches_BPC[b, :count] = patches[by_patch]
        out.positions_BP2[b, :count] = positions[by_patch]
        out.frames_BP[b, :count] = np.repeat(frames[order], unit)
        out.windows_BP[b, :count] = np.repeat(windows[order], unit)
        out.order_BM[b, : len(order)] = np.argsort(order)
    return out


def patch_positions(grid: Grid, cfg: VisionConfig) -> Int[np.ndarray, "P 2"]:
    """Row and column of every patch, token by token."""
    t, h, w = grid
    m = cfg.merge
    rows, columns = np.mgrid[:h, :w]

    def by_token(x):
        return x.reshape(h // m, m, w // m, m).swapaxes(1, 2).reshape(-1)

    return np.tile(np.stack([by_token(rows), by_token(columns)], axis=-1), (t, 1))


def segments(
    grids: Sequence[Grid], cfg: VisionConfig
) -> tuple[Int[np.ndarray, "M"], Int[np.ndarray, "M"]]:
    """Frame and window of every token, row by row, numbered from 1 across all images and videos."""
    frames, windows = [], []
    frame = window = 1
    side = cfg.window_tokens
    for t, h, w in grids:
        step, row, column = np.mgrid[:t, : h // cfg.merge, : w // cfg.merge].reshape(3, -1)
        down, across = -(-h // cfg.merge // side), -(-w // cfg.merge // side)
        frames.append(frame + step)
        windows.append(window + (step * down + row // side) * across + column // side)
        frame, window = frame + t, window + t * down * across
    return np.concatenate(frames), np.concatenate(windows)


def _rgb(image: Picture) -> UInt8[np.ndarray, "H W 3"]:
    if isinstance(image, Image.Image):
        if min(image.size) < 1:  # PIL cannot convert it
            return np.zeros((image.height, image.width, 3), np.uint8)
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        return np.asarray(image.convert("RGB"))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(
            f"an image array must be uint8 of shape (height, width, 3), found {image.dtype} "
            f"{image.shape}: convert it, or give a PIL image"
        )
    return image


def _normalised(frames: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Resized and normalised frames (F, H, W, 3), rounded where transformers rounds."""
    width_height = size[::-1]
    bicubic = Image.Resampling.BICUBIC
    resized = [np.asarray(Image.fromarray(f).resize(width_height, bicubic)) for f in frames]
    unit = (np.stack(resized).astype(np.float64) * (1 / 255)).astype(np.float32)
    return (unit - MEAN) / STD


def _patchify(frames_FHW3: np.ndarray, cfg: VisionConfig) -> tuple[np.ndarray, Grid]:
    missing = -len(frames_FHW3) % cfg.temporal_patch
    frames = np.concatenate([frames_FHW3, *[frames_FHW3[-1:]] * missing])
    _, height, width, channels = frames.shape
    p, m = cfg.patch, cfg.merge
    t, h, w = len(frames) // cfg.temporal_patch, height // p, width // p
    x = frames.reshape(t, cfg.temporal_patch, h // m, m, p, w // m, m, p, channels)
    x = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return np.ascontiguousarray(x).reshape(t * h * w, cfg.patch_width), (t, h, w)
