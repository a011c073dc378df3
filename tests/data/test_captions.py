"""Captions from every kind of file; order, held-out captions, damage."""

import io
import itertools
import json
import os
import tarfile

import numpy as np
import pytest

from x2jax.data.caption_index import build_index
from x2jax.data.captions import CaptionData, Order, written

TEXTS = [f"a picture of {n} {'猫' if n % 3 else 'dogs'}" for n in range(20)]


def tokenize(texts):
    """Lengths: enough to tell texts apart, and what a tokenizer's output looks like."""
    return np.array([[len(t), hash(t) & 0xFFFF] for t in texts], np.int32)


def write_lines(path, texts=TEXTS):
    path.write_text("".join(t + "\n" for t in texts), encoding="utf-8")
    return str(path)


def write_jsonl(path, texts=TEXTS, key="caption"):
    lines = [json.dumps({"id": n, key: t}, ensure_ascii=False) for n, t in enumerate(texts)]
    return write_lines(path, lines)


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def read_all(index):
    return [index.read(n) for n in range(len(index))]


def open_data(tmp_path, pattern, **kw):
    options = dict(seed=0, batch_size=4, held_out=2, key="caption") | kw
    return CaptionData(pattern, tmp_path / "run", teacher=tokenize, student=tokenize, **options)


def ids(data, start, count):
    return [b.sample_id.tolist() for b in itertools.islice(data.iterate(start), count)]


def test_lines_json_lines_and_tars_read_alike(tmp_path):
    tar = [(f"{n}.txt", t.encode()) for n, t in enumerate(TEXTS[:8])]
    tar += [(f"{n}.jpg", b"pixels") for n in range(8)]
    tar += [(f"{n}.json", json.dumps({"caption": t}).encode()) for n, t in enumerate(TEXTS[8:16])]
    tar += [(f"{n}.caption", t.encode()) for n, t in enumerate(TEXTS[16:])]
    files = [
        write_lines(tmp_path / "a.txt"),
        write_jsonl(tmp_path / "b.jsonl"),
        write_tar(tmp_path / "c.tar", tar),
    ]
    prints = set()
    for n, path in enumerate(files):
        index = build_index(path, tmp_path / f"index{n}", "caption")
        assert read_all(index) == TEXTS
        prints.add(index.fingerprint)
    assert len(prints) == 1, "the fingerprint is of the captions"
    assert read_all(build_index(files, tmp_path / "all", "caption")) == TEXTS * 3


def test_parquet_columns_read_alike(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="pip install 'x2jax[parquet]'")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    table = arrow.table({"prompt": [*TEXTS, None, "two\nlines"], "n": list(range(22))})
    parquet.write_table(table, path, row_group_size=7)
    index = build_index(str(path), tmp_path / "index", "prompt")
    assert read_all(index) == [*TEXTS, "two lines"]
    assert index.report.dropped == {"empty": 1}
    with pytest.raises(ValueError, match=r"no column 'caption'; it has prompt, n"):
        build_index(str(path), tmp_path / "index", "caption")


def test_bad_captions_are_counted_by_reason_and_named(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    good = json.dumps({"caption": "good"}).encode()
    lines = [good, b"{cut", b'{"text": "x"}', b'{"caption": 3}', b'{"caption": " "}', b"\xff\xfe"]
    path.write_bytes(b"\n".join([*lines, b"[1]", good]))  # no newline at the end
    index = build_index(str(path), tmp_path / "index", "caption")
    assert read_all(index) == ["good", "good"]
    assert index.report.dropped == {
        "not JSON": 1, "no 'caption' in the JSON": 2, "'caption' is not text": 1, "empty": 1,
        "not UTF-8": 1,
    }  # fmt: skip
    assert index.report.names["not JSON"] == [f"{path}: line 2"]
    assert "dropped 6" in capsys.readouterr().out
    write_lines(tmp_path / "b.txt", ["", "  "])
    with pytest.raises(ValueError, match=r"no usable caption in 1 files:(.|\n)*2  empty"):
        build_index(str(tmp_path / "b.txt"), tmp_path / "index", "caption")


def test_a_cut_tar_says_so(tmp_path):
    path = write_tar(tmp_path / "a.tar", [(f"{n}.txt", t.encode()) for n, t in enumerate(TEXTS)])
    with open(path, "r+b") as file:
        file.truncate(512 * 9)
    index = build_index(path, tmp_path / "index", "caption")
    assert read_all(index) == TEXTS[:4]
    assert len(index.report.problems) == 1


def test_the_index_is_made_once_and_again_when_a_file_changes(tmp_path):
    path = write_lines(tmp_path / "a.txt")
    first = build_index(path, tmp_path / "index", "caption")
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "index").iterdir()}
    build_index(path, tmp_path / "index", "caption")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "index").iterdir()} == stamps
    write_lines(tmp_path / "a.txt", [t.upper() for t in TEXTS])
    with pytest.raises(ValueError, match=r"a\.txt has changed since its captions were indexed"):
        first.read(3)
    os.utime(path, ns=(0, 1))
    assert build_index(path, tmp_path / "index", "caption").read(3) == TEXTS[3].upper()


def test_unusable_patterns_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file matches --config\.data=.*none\.txt"):
        build_index(str(tmp_path / "none.txt"), tmp_path, "caption")
    write_lines(tmp_path / "a.csv")
    with pytest.raises(ValueError, match=r"a\.csv: captions come as \.txt, \.jsonl"):
        build_index(str(tmp_path / "a.csv"), tmp_path, "caption")
    with pytest.raises(ValueError, match=r"write tiny:N"):
        written("tiny:many", tmp_path)


def test_epochs_go_through_all_but_the_held_out_captions(tmp_path):
    # Every text twice: a held-out text must not come back through its duplicate.
    index = build_index(write_lines(tmp_path / "a.txt", TEXTS * 2), tmp_path / "index", "caption")
    order = Order(index, 3, seed=1)
    assert order.count == 34 and len({index.read(n) for n in order.held}) == 3
    held = {index.read(n) for n in order.held}
    epochs = [[order.number(e * 34 + k) for k in range(34)] for e in range(2)]
    for epoch in epochs:
        assert len(set(epoch)) == 34
        assert not held & {index.read(n) for n in epoch}
    assert epochs[0] != epochs[1]
    assert [Order(index, 3, seed=2).number(k) for k in range(34)] != epochs[0]
    with pytest.raises(ValueError, match="cannot hold out 20 captions of 40: 20 differ"):
        Order(index, 20, seed=0)


def test_batches_are_a_function_of_seed_and_position(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl")
    data = open_data(tmp_path, path)
    whole = ids(data, 0, 6)
    assert ids(data, 2, 4) == whole[2:]
    assert ids(open_data(tmp_path, path), 0, 6) == whole
    assert ids(open_data(tmp_path, path, seed=1), 0, 6) != whole
    halves = ids(open_data(tmp_path, path, batch_size=2), 0, 12)
    assert [a + b for a, b in zip(halves[::2], halves[1::2], strict=True)] == whole
    batch = next(data.iterate(0))
    texts = [data.index.read(n) for n in batch.sample_id]
    np.testing.assert_array_equal(batch.student, tokenize(texts))
    np.testing.assert_array_equal(batch.teacher, tokenize(texts))
    assert not set(data.held_out_instructions) & {data.index.read(n) for ids in whole for n in ids}
    assert data.fingerprint != open_data(tmp_path, path, held_out=3).fingerprint


def test_captions_of_the_tiny_world_are_written_once(tmp_path):
    path = written("tiny:30", tmp_path)
    before = os.stat(path).st_mtime_ns
    assert written("tiny:30", tmp_path) == path and os.stat(path).st_mtime_ns == before
    index = build_index(path, tmp_path / "index", "caption")
    assert len(index) == 30 and len(set(read_all(index))) > 20
