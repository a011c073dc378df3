import json
import os
import tarfile

import numpy as np
import pytest

from tests.data import shards
from tests.data.shards import END, picture, sample, write
from x2jax.data import tasks
from x2jax.data.index import split_held_out
from x2jax.data.records import (
    CHINESE,
    ENGLISH,
    Dropped,
    Filters,
    captions,
    check_scores,
    choose,
    instructions,
    total,
)
from x2jax.data.tar_index import build_index, find_shards


def index_of(path, **options):
    return build_index(path, progress=False, **options)


def stems(index):
    return [s.decode() for s in index.stems]


def test_reads_a_plain_shard(tmp_path):
    path = write(
        tmp_path / "a.tar",
        sample("0", target=picture(40, 80)),
        sample("1", task="风格更改", names=("1.jpg", "2.jpg")),
    )
    index = index_of(path)
    assert stems(index) == ["0", "1"]
    assert index.columns["task"].tolist() == [2, 3]
    assert index.columns["target_size"].tolist() == [[40, 80], [64, 64]]
    assert not index.report.problems and not index.report.dropped
    assert index.name(1) == f"{path}:1"


def test_concatenation_with_repeated_names_loses_nothing(tmp_path):
    one = sample("0") + sample("1") + END
    path = write(tmp_path / "a.tar", one, bytes(512 * 18), one, sample("0"), sample("0"))
    index = index_of(path)
    assert stems(index) == ["0", "1", "0", "1", "0", "0"]
    with tarfile.open(path) as plain:  # what the header walk is for
        assert len(plain.getmembers()) == 8
    assert len({tuple(t) for t in index.columns["target"].tolist()}) == 6


def test_truncated_shard_keeps_whole_samples(tmp_path):
    whole = sample("0") + sample("1")
    path = write(tmp_path / "a.tar", whole, sample("2")[:900], end=b"")
    index = index_of(path)
    assert stems(index) == ["0", "1"]
    ((shard, problem),) = index.report.problems
    assert shard == path and "truncated" in problem and "2.1.0.jpg" in problem
    # Cut inside the JSON: the sample has its pictures, but not all of it.
    cut = whole[: len(whole) - 1510]
    index = index_of(write(tmp_path / "b.tar", cut, end=b""))
    assert stems(index) == ["0"] and dict(index.report.dropped) == {"no JSON": 1}
    index = index_of(write(tmp_path / "c.tar", whole, end=b""))
    assert stems(index) == ["0", "1"] and "no end-of-archive" in index.report.problems[0][1]


def test_goes_on_after_damage(tmp_path):
    path = write(tmp_path / "a.tar", sample("0"), b"x" * 2048, sample("1"))
    index = index_of(path)
    assert stems(index) == ["0", "1"] and "no tar header" in index.report.problems[0][1]
    junk = write(tmp_path / "b.tar", b"junk" * 999)
    with pytest.raises(ValueError, match=r"no usable sample(.|\n)*no tar header at byte 0"):
        index_of(junk)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_and_extended_headers(tmp_path, form):
    plain = write(tmp_path / "a.tar", sample("0"))
    folder = "folder/" * 30
    with tarfile.open(plain) as old, tarfile.open(tmp_path / "b.tar", "w", format=form) as new:
        for info in old.getmembers():
            data = old.extractfile(info)
            info.name, info.mtime = folder + info.name, 1.5
            new.addfile(info, data)
    assert stems(index_of(tmp_path / "b.tar")) == [folder + "0"]


def test_missing_shards(tmp_path):
    for pattern in (tmp_path / "no.tar", tmp_path / "*.tar"):
        with pytest.raises(FileNotFoundError, match="no tar shard matches"):
            index_of(str(pattern))
    write(tmp_path / "b.tar", sample("0"))
    write(tmp_path / "a.tar", sample("0"))
    assert [os.path.basename(p) for p in find_shards(str(tmp_path))] == ["a.tar", "b.tar"]


def test_drops_are_named_and_counted(tmp_path):
    path = write(
        tmp_path / "a.tar",
        sample("ok"),
        sample("empty", instruction=" "),
        sample("none", instruction=None),
        sample("odd", task="frobnicate"),
        sample("odd2", task="frobnicate"),
        sample("notarget", names=("1.jpg", "3.jpg")),
        sample("broken", target=b"not a picture"),
        shards.member("bare.json", b"{"),
    )
    index = index_of(path, cache=tmp_path / "cache")
    assert stems(index) == ["ok"]
    assert dict(index.report.dropped) == {
        "no instruction": 2,
        "unknown task: frobnicate": 2,
        "no target image": 1,
        "target image has no header": 1,
        "unreadable JSON": 1,
    }
    saved = json.loads((tmp_path / "cache" / "index_report.json").read_text())
    assert saved["names"]["unknown task: frobnicate"] == [f"{path}:odd", f"{path}:odd2"]
    assert "unknown task: frobnicate" in str(index.report)


def test_cache_is_reused_until_something_changes(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tar", sample("0"), sample("1", label="gpt4o", aesthetic_score=5))
    cache = tmp_path / "cache"
    first = index_of(path, cache=cache)
    monkeypatch.setattr("x2jax.data.tar_index._make", lambda *a: pytest.fail("indexed again"))
    again = index_of(path, cache=cache)
    assert again.fingerprint == first.fingerprint and again.report == first.report
    monkeypatch.undo()
    assert len(index_of(path, cache=cache, filters=None)) == 2
    (cache / "index.npz").write_bytes(b"half a file")
    assert len(index_of(path, cache=cache)) == 1
    write(tmp_path / "a.tar", sample("0"), sample("1"), sample("2"))
    assert len(index_of(path, cache=cache)) == 3
    assert sorted(p.name for p in cache.iterdir()) == ["index.npz", "index_report.json"]


STEP1X = dict(label="step1x", liqe_score_edit=3, aesthetic_score_v2_5_edit=4.8)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (dict(label="Delete", score="[4, 5]"), None),
        (dict(label="Delete", score="[4, 4]"), "delete: score below 9"),
        (dict(label="Delete"), "delete: no score"),
        (dict(STEP1X, liqe_score_clip_edit=0.6, score_7b=[4, 5]), None),
        (dict(STEP1X, liqe_score_clip_edit=0.6, score=[9, 9]), None),
        (dict(STEP1X, liqe_score_clip_edit=0.6, score=[9, 8]), "step1x: score below 18"),
        (dict(STEP1X, liqe_score_clip_edit=0.6, score_7b=[4, 4], score=[9, 9]),
         "step1x: score_7b below 9"),
        (dict(STEP1X, liqe_score_clip_edit=0.5), "step1x: liqe_score_clip_edit below 0.6"),
        (dict(label="gpt4o", score_7b=[5, 5], task="人物修图"), "gpt4o: task 人物修图"),
        (dict(label="gpt4o", score_7b=[5, 5], task="添加主体"), None),
        (dict(label="gpt4o", aesthetic_score=5.9), "gpt4o: aesthetic_score below 6"),
        (dict(label="other"), None),
    ],
)  # fmt: skip
def test_filters(record, reason):
    if reason is None:
        check_scores(record, Filters())
    else:
        with pytest.raises(Dropped) as e:
            check_scores(record, Filters())
        assert str(e.value) == reason


def test_record_variants():
    assert total("[4, '5']") == 9 and total("7.5") == 7.5 and total("bad") is None
    both = instructions(dict(instruction="删除猫", instruction_en="remove the cat"))
    assert choose(both, ENGLISH) == "remove the cat" and choose(both, CHINESE) == "删除猫"
    assert choose(instructions(dict(instruction="删除猫")), ENGLISH) == "删除猫"
    assert tasks.lookup(" Visual_Material_Change ") == 6 and tasks.lookup("unknown") is None
    assert len(tasks.TASKS) == 16 and {tasks.lookup(t) for t in tasks.TASKS[1:]} == set(
        range(1, 16)
    )


def plain(stem, caption, suffix, image="jpg"):
    form = {"jpg": "JPEG", "png": "PNG"}[image]
    return shards.member(f"{stem}.{image}", picture(48, 32, form=form)) + shards.member(
        f"{stem}.{suffix}", caption
    )


def test_pictures_of_a_plain_webdataset(tmp_path):
    path = write(
        tmp_path / "a.tar",
        plain("0", b"a red square\n", "txt"),
        plain("1", json.dumps({"caption": "一个圆"}).encode(), "json", image="png"),
        plain("2", json.dumps({"width": 3}).encode(), "json") + shards.member("2.txt", b"a bird"),
        plain("none", b" ", "txt"),
        plain("bare", b"\xff\xfe", "txt"),
        plain("broken", b"{", "json"),
        shards.member("alone.jpg", picture()),
        shards.member("text.txt", b"a text"),
    )
    index = index_of(path, layout="pictures")
    assert stems(index) == ["0", "1", "2"]
    assert index.columns["languages"].tolist() == [ENGLISH, CHINESE, ENGLISH]
    assert index.columns["target_size"].tolist() == [[48, 32]] * 3
    assert dict(index.report.dropped) == {
        "no caption": 2,
        "caption is not UTF-8": 1,
        "unreadable JSON": 1,
        "no target image": 1,
    }


def test_pictures_of_edit_shards_are_targets_with_their_captions(tmp_path):
    path = write(
        tmp_path / "a.tar",
        sample("0", caption_target="a cat on snow", caption_source="snow"),
        sample("1"),
    )
    index = index_of(path, layout="pictures", cache=tmp_path / "cache")
    assert stems(index) == ["0"] and dict(index.report.dropped) == {"no caption": 1}
    assert index_of(path, layout="pictures", cache=tmp_path / "cache").layout == "pictures"
    edits = index_of(path, cache=tmp_path / "cache")
    assert stems(edits) == ["0", "1"], "another layout is another index"
    np.testing.assert_array_equal(index.columns["target"][0], edits.columns["target"][0])
    with pytest.raises(ValueError, match=r"unknown layout 'images' .* one of edits, pictures"):
        index_of(path, layout="images")


def test_caption_variants():
    assert captions(b"\xef\xbb\xbf a cat ") == {ENGLISH: "a cat"}
    assert captions(b' {"prompt": "a cat", "caption": "a dog"}') == {ENGLISH: "a dog"}
    assert captions(b'{"caption": 3}') == {} and captions(b"") == {}


def test_held_out_is_balanced_and_apart(tmp_path):
    names = ["add"] * 9 + ["remove"] * 5 + ["style"] * 2
    path = write(tmp_path / "a.tar", *(sample(str(n), task=t) for n, t in enumerate(names)))
    index = index_of(path)
    train, held = split_held_out(index, 6, seed=0)
    assert sorted(index.columns["task"][held].tolist()) == [1, 1, 1, 2, 2, 2]
    assert not set(held) & set(train.active) and len(train) == 10
    np.testing.assert_array_equal(held, split_held_out(index, 6, seed=0)[1])
    assert train.fingerprint != index.fingerprint
    with pytest.raises(ValueError, match="cannot hold out 11 samples: 10"):
        split_held_out(index, 11, seed=0)
