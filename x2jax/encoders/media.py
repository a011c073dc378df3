"""Picture and video files to pixels: what the encoders see, or a reason why not.

Videos are read by PyAV: pip install 'x2jax[video]'.
"""

import math
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError


class Video(NamedTuple):
    """Attributes:
    frames_FHW3: sampled frames, upright.
    fps: sampled frames per second; what `video_patches` takes.
    """

    frames_FHW3: UInt8[np.ndarray, "F H W 3"]
    fps: float


def open_image(path: str | Path) -> Image.Image:
    """A picture file, read whole and turned upright as its EXIF says.

    Raises:
      FileNotFoundError: no such file.
      ValueError: an empty or truncated file, no picture, or one too large to be one.
    """
    path = _file(path, "picture")
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise ValueError(f"{path} is no picture that PIL can read") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise ValueError(f"cannot read the picture {path}: {e}; is it complete?") from None


def read_video(
    path: str | Path,
    *,
    fps: float = 2.0,
    min_frames: int = 4,
    max_frames: int = 768,
    multiple: int = 2,
) -> Video:
    """Frames of a video file at about `fps`, evenly spaced, chosen as transformers chooses them.

    A first pass counts the frames without decoding them: what containers say of themselves is often
    wrong.

    Args:
      fps: wanted frames per second.
      min_frames, max_frames: bounds on their number; a shorter video gives what it has.
      multiple: the number of frames is a multiple of it (a temporal patch); a shorter video gives
        what it has.

    Raises:
      ImportError: PyAV is absent.
      FileNotFoundError: no such file.
      ValueError: bounds that hold no multiple; an empty file, no video in it, no frames in that, or
        one that cannot be decoded.
    """
    if not (fps > 0 and math.isfinite(fps)) or not 1 <= min_frames <= max_frames:
        raise ValueError(
            f"fps={fps} must be positive and min_frames={min_frames} in 1..max_frames={max_frames}"
        )
    if max_frames < multiple:
        raise ValueError(f"max_frames={max_frames} holds no multiple of {multiple}")
    path = _file(path, "video")
    try:
        import av
        from av.error import FFmpegError
    except ImportError:
        raise ImportError("videos are read by PyAV: pip install 'x2jax[video]'") from None
    try:
        total, rate = _count(av, path)
        if total == 0:
            raise ValueError(f"the video {path} has no frames: is it complete?")
        wanted = sample_frames(
            total, rate, fps, min_frames=min_frames, max_frames=max_frames, multiple=multiple
        )
        frames = _decode(av, path, wanted)
    except FFmpegError as e:
        raise ValueError(f"cannot read the video {path}: {e}; is it complete?") from None
    if len(frames) < len(wanted):
        raise ValueError(
            f"the video {path} has {total} frames and only {len(frames)} of the {len(wanted)} "
            "wanted could be decoded: is it complete?"
        )
    return Video(np.stack(frames), len(wanted) / total * rate)


def sample_frames(
    total: int, rate: float, fps: float, *, min_frames: int, max_frames: int, multiple: int
) -> list[int]:
    """Which of `total` frames at `rate` a second to take, as `sample_frames` of transformers."""
    most = min(max_frames, total) // multiple * multiple
    count = min(max(total / rate * fps, min_frames), most)
    count = math.floor(count / multiple) * multiple
    if not count:
        return list(range(min(total, max_frames)))  # shorter than a multiple: all of it
    # In float32, as torch.arange counts.
    step = total / count
    return [int(np.float32(k * step)) for k in range(count)]


def _file(path: str | Path, what: str) -> Path:
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no {what} file {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"the {what} {path} is empty (0 bytes): fetch it again")
    return path


def _stream(container, path: Path):
    if not container.streams.video:
        kinds = sorted({s.type for s in container.streams})
        raise ValueError(
            f"{path} holds no video, only {', '.join(kinds) or 'nothing'}: is it complete?"
        )
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    return stream


def _count(av, path: Path) -> tuple[int, float]:
    """Frames, and frames a second."""
    with av.open(str(path)) as container:
        stream = _stream(container, path)
        rate = stream.average_rate or stream.guessed_rate or Fraction(24)
        return sum(1 for packet in container.demux(stream) if packet.size), float(rate)


def _decode(av, path: Path, wanted: list[int]) -> list[np.ndarray]:
    rest, frames = set(wanted), []
    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(_stream(container, path))):
            if number in rest:
                frames.append(frame.to_ndarray(format="rgb24"))
                if number == wanted[-1]:
                    break
    return frames
