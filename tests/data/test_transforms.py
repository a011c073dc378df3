import numpy as np
import pytest
from PIL import Image

from tests.data.shards import broken, picture
from x2jax.data import transforms
from x2jax.data.transforms import BUCKETS_1024, BUCKETS_TINY_MIXED, BadImage


def test_buckets():
    assert len(BUCKETS_1024) == len(BUCKETS_TINY_MIXED) == 13
    assert BUCKETS_1024[0] == (720, 1456) and BUCKETS_1024[6] == (1024, 1024)
    assert all(w // 16 * (h // 16) <= 4096 and w % 16 == h % 16 == 0 for w, h in BUCKETS_1024)
    assert {(h, w) for w, h in BUCKETS_1024} == set(BUCKETS_1024)
    assert BUCKETS_TINY_MIXED[0] == (40, 96) and BUCKETS_TINY_MIXED[-1] == (96, 40)
    assert transforms.canvas_size(BUCKETS_TINY_MIXED) == (96, 96)


@pytest.mark.parametrize("bucket", BUCKETS_1024)
def test_a_bucket_is_nearest_to_itself(bucket):
    assert transforms.nearest_bucket(bucket[0] * 3, bucket[1] * 3, BUCKETS_1024) == bucket


def test_modes():
    for mode, form in (("L", "PNG"), ("P", "PNG"), ("CMYK", "JPEG"), ("RGBA", "PNG")):
        image = transforms.decode(picture(mode=mode, form=form))
        assert image.mode == "RGB" and abs(int(np.asarray(image)[5, 5, 0]) - 100) < 4, mode
    clear = Image.new("RGBA", (4, 4), (9, 9, 9, 0))
    assert np.asarray(transforms.to_rgb(clear)).min() == 255
    for image in (Image.new("1", (4, 4)), Image.new("F", (4, 4)), Image.new("LA", (4, 4))):
        with pytest.raises(BadImage, match=f"image mode {image.mode}"):
            transforms.to_rgb(image)
    with pytest.raises(BadImage, match="image mode I;16"):
        transforms.decode(picture(mode="I;16", form="PNG"))
    with pytest.raises(BadImage, match="cannot decode"):
        transforms.decode(broken())


def test_resize_keeps_aspect_and_centre():
    x = np.random.default_rng(1).integers(0, 255, (60, 200, 3)).astype(np.uint8)
    out = np.asarray(transforms.resize_crop(Image.fromarray(x), (30, 30)))
    whole = np.asarray(Image.fromarray(x).resize((100, 30), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(out, whole[:, 35:65])
    same = np.random.default_rng(0).integers(0, 255, (24, 40, 3)).astype(np.uint8)
    np.testing.assert_array_equal(transforms.resize_crop(Image.fromarray(same), (40, 24)), same)
