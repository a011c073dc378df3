"""Picture and video files: what is read, which frames are taken, and what is refused and how."""

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.video_utils import VideoMetadata

from tests.encoders.test_qwen_vision import VISION, of_video_processor, picture
from x2jax.encoders.media import open_image, read_video, sample_frames
from x2jax.encoders.qwen2_5_vl import video_patches

FRAMES, RATE = 20, 8
av = pytest.importorskip("av", reason="pip install 'x2jax[video]'; make test does")


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """Frame k is grey of level 10 k; lossless."""
    path = tmp_path_factory.mktemp("film") / "a.mkv"
    write_video(path, FRAMES)
    return path


def write_video(path, frames, codec="ffv1", form="bgr0"):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 48, 32, form
        for k in range(frames):
            grey = np.full((32, 48, 3), 10 * k, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


@pytest.mark.parametrize(("fps", "most", "levels"), [
    (2.0, 768, [0, 5, 10, 15]),  # 2.5 s give 5 frames, rounded down to a multiple of 2
    (4.0, 768, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]),
    (100.0, 6, [0, 3, 6, 10, 13, 16]),
    (0.1, 768, [0, 5, 10, 15]),  # at least 4
])  # fmt: skip
def test_frames_are_spread_evenly(film, fps, most, levels):
    video = read_video(film, fps=fps, max_frames=most)
    assert video.frames_FHW3.shape == (len(levels), 32, 48, 3)
    np.testing.assert_array_equal(video.frames_FHW3[:, 3, 5, 1], 10 * np.array(levels))
    assert video.fps == pytest.approx(len(levels) / FRAMES * RATE)


@pytest.mark.parametrize("total", [4, 5, 31, 240, 3001])
@pytest.mark.parametrize("rate", [1.0, 23.976, 60.0])
@pytest.mark.parametrize(("fps", "most"), [(2, 768), (1.0, 16), (7.5, 100)])
def test_the_same_frames_as_transformers(total, rate, fps, most):
    class Defaults:
        num_frames, fps, temporal_patch_size, min_frames, max_frames = None, 2, 2, 4, 768

    metadata = VideoMetadata(total_num_frames=total, fps=rate)
    theirs = of_video_processor("sample_frames")(Defaults(), metadata, fps=fps, max_frames=most)
    mine = sample_frames(total, rate, fps, min_frames=4, max_frames=most, multiple=2)
    np.testing.assert_array_equal(mine, theirs)
    assert isinstance(theirs, torch.Tensor)


def test_a_film_becomes_patches(film):
    video = read_video(film, fps=2.0)
    media = video_patches(video.frames_FHW3, VISION, fps=video.fps, min_pixels=64, max_pixels=2000)
    assert media.grid[0] == 2 and media.seconds == pytest.approx(2 / 1.6)


def test_short_films_are_read_whole(tmp_path):
    write_video(tmp_path / "one.mkv", 1)
    assert read_video(tmp_path / "one.mkv").frames_FHW3.shape[0] == 1
    write_video(tmp_path / "three.mp4", 3, "mpeg4", "yuv420p")
    assert read_video(tmp_path / "three.mp4").frames_FHW3.shape[0] == 2


def test_unreadable_films_say_why(film, tmp_path, monkeypatch):
    whole = film.read_bytes()

    def refuses(data, message):
        (tmp_path / "x.mkv").write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read_video(tmp_path / "x.mkv")

    with pytest.raises(FileNotFoundError, match="no video file"):
        read_video(tmp_path / "none.mp4")
    refuses(b"", r"is empty \(0 bytes\): fetch it again")
    refuses(b"hello" * 99, r"cannot read the video .*; is it complete\?")
    refuses(whole[:600], r"has no frames: is it complete\?")  # before its first picture
    write_video(tmp_path / "whole.mp4", FRAMES, "mpeg4", "yuv420p")
    data = bytearray((tmp_path / "whole.mp4").read_bytes())
    start, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    data[(start + end) // 2 : end] = bytes(end - (start + end) // 2)
    refuses(bytes(data), r"cannot read the video .*; is it complete\?")
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.sample_rate = 8000
        container.mux(list(stream.encode(frame)) + list(stream.encode()))
    with pytest.raises(ValueError, match="holds no video, only audio"):
        read_video(tmp_path / "sound.wav")
    for wrong in (dict(fps=0), dict(fps=float("nan")), dict(min_frames=9, max_frames=8)):
        with pytest.raises(ValueError, match="must be positive and min_frames"):
            read_video(film, **wrong)
    with pytest.raises(ValueError, match="max_frames=1 holds no multiple of 2"):
        read_video(film, min_frames=1, max_frames=1)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install 'x2jax\[video\]'"):
        read_video(film)


def test_pictures_are_upright_and_refused_with_reasons(tmp_path):
    source = picture(20, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    source.save(tmp_path / "turned.png", exif=exif)
    upright = open_image(tmp_path / "turned.png")
    np.testing.assert_array_equal(upright, np.rot90(np.asarray(source), -1))
    data = io.BytesIO()
    source.resize((300, 200)).save(data, "JPEG")
    cases = {
        "empty": (b"", r"is empty \(0 bytes\): fetch it again"),
        "noise": (b"not a picture", "is no picture that PIL can read"),
        "cut": (data.getvalue()[:900], r"cannot read the picture .* is it complete\?"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            open_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no picture file"):
        open_image(tmp_path / "none.png")
