"""The tiny world: deterministic, faithful to its own keep masks, readable as X2Edit tars."""

import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from x2jax.tiny import edits, shards, world


def test_scenes_are_deterministic_and_varied():
    pictures = [world.render(world.sample_scene(np.random.default_rng(i))) for i in range(20)]
    again = [world.render(world.sample_scene(np.random.default_rng(i))) for i in range(20)]
    assert all((a == b).all() for a, b in zip(pictures, again, strict=True))
    assert len({p.tobytes() for p in pictures}) == 20
    assert pictures[0].shape == (64, 64, 3) and pictures[0].dtype == np.uint8


@pytest.mark.parametrize("size", [(40, 96), (96, 40), (72, 56)])
def test_any_aspect_ratio(size):
    for i in range(5):
        scene = world.sample_scene(np.random.default_rng(i), figure=("", "face", "person")[i % 3])
        assert world.render(scene, size).shape == (size[1], size[0], 3)


def test_rendering_is_resolution_independent():
    scene = world.Scene("plain", "blue", (world.Object("circle", "red", x=0.2, y=-0.1),))
    small = world.render(scene, (64, 64)).astype(float)
    large = world.render(scene, (256, 256)).astype(float)
    shrunk = large.reshape(64, 4, 64, 4, 3).mean((1, 3))
    assert np.abs(small - shrunk).mean() < 1
    moved = world.render(scene.with_object(0, x=0.3), (64, 64))
    assert np.abs(moved - shrunk).mean() > 3


@pytest.mark.parametrize("task", edits.TASKS)
def test_every_task(task):
    for i in range(40):
        sample = edits.edit(3, i, task)
        assert sample.task == task
        assert sample.instruction_en.isascii() and len(sample.instruction_en.split()) <= 32
        assert any("\u4e00" <= c <= "\u9fff" for c in sample.instruction_zh)
        assert "{" not in sample.instruction_en + sample.instruction_zh
        assert sample.caption_source and sample.caption_target
        changed = (sample.source != sample.target).any(-1)
        assert changed.sum() >= 4, sample.instruction_en
        assert not changed[sample.keep_mask].any(), sample.instruction_en
        if task in (1, 2, 4, 5, 6, 7, 8, 9, 10):
            assert sample.keep_mask.any() and not sample.keep_mask.all()


def test_the_keep_mask_is_tight():
    """A removal may touch little more than what it changes, so that a wrong mask is noticed."""
    for i in range(40):
        sample = edits.edit(4, i, 8)
        changed = (sample.source != sample.target).any(-1)
        assert (~sample.keep_mask).sum() <= 2.5 * changed.sum() + 60


def test_edits_are_deterministic_by_seed_and_index():
    one, same = edits.edit(1, 7), edits.edit(1, 7)
    assert one.instruction_zh == same.instruction_zh and (one.target == same.target).all()
    streams = [edits.edit(seed, i).source.tobytes() for seed in (1, 2) for i in range(5)]
    assert len(set(streams)) == 10
    assert {edits.edit(0, i, size=(16, 16)).task for i in range(150)} == set(edits.TASKS)
    with pytest.raises(ValueError, match=r"tasks 1\.\.15"):
        edits.edit(0, 0, 16)


def _digests(tars, root):
    return {str(t.relative_to(root)): hashlib.sha256(t.read_bytes()).hexdigest() for t in tars}


def test_shards(tmp_path):
    sizes = ((64, 64), (40, 96))
    options = dict(samples_per_tar=8, sizes=sizes, progress=False)
    tars = shards.write_shards(tmp_path / "a", 40, 5, **options)
    again = shards.write_shards(tmp_path / "b", 40, 5, **options)
    assert _digests(tars, tmp_path / "a") == _digests(again, tmp_path / "b")
    other = shards.write_shards(tmp_path / "c", 40, 6, **options)
    assert _digests(tars, tmp_path / "a") != _digests(other, tmp_path / "c")
    assert not list(tmp_path.rglob("*.partial"))

    seen = set()
    for path in tars:
        label, part, name = path.relative_to(tmp_path / "a").parts
        assert part == "0" and name[:5].isdigit() and name.endswith(".tar")
        with tarfile.open(path) as tar:
            members = [(m.name, tar.extractfile(m).read()) for m in tar]
        assert 4 <= len(members) <= 32
        for i in range(0, len(members), 4):
            keys, suffixes = zip(*(m[0].split(".", 1) for m in members[i : i + 4]), strict=True)
            assert len(set(keys)) == 1 and suffixes == ("1.0.jpg", "2.jpg", "json", "txt")
            source, target, meta, text = (m[1] for m in members[i : i + 4])
            meta = json.loads(meta)
            assert meta["label"] == label and meta["instruction"] == text.decode()
            assert meta["instruction"] in (meta["instruction_en"], meta["instruction_zh"])
            task = next(k for k, v in shards.RAW_NAMES.items() if meta["task"] in v)
            size = (meta["width"], meta["height"])
            want = edits.edit(5, int(keys[0]), task, size)
            for data, image in ((source, want.source), (target, want.target)):
                found = np.asarray(Image.open(io.BytesIO(data)))
                assert np.abs(found.astype(int) - image).mean() < 6
            seen.add(keys[0])
    assert sorted(seen) == [f"{i:09d}" for i in range(40)]


def test_shards_of_some_tasks_only(tmp_path):
    tars = shards.write_shards(tmp_path, 6, 0, tasks=(1,), progress=False)
    assert [t.parts[-3:] for t in tars] == [("Delete", "0", "00000.tar")]
    with pytest.raises(ValueError, match=r"1\.\.15"):
        shards.write_shards(tmp_path, 6, 0, tasks=(0,), progress=False)
