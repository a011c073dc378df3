import itertools
import json

import jax
import numpy as np
import pytest

from tests.data.shards import broken, picture, sample, tokenize, write
from x2jax.data import transforms
from x2jax.data.index import split_held_out
from x2jax.data.loader import Loader
from x2jax.data.tar_index import build_index

TASKS = ("add", "remove", "style")


def make_index(path, *parts):
    return build_index(write(path / "a.tar", *parts), progress=False)


def loader_of(index, **options):
    defaults = dict(
        seed=3, batch_size=4, buckets=transforms.BUCKETS_TINY, tokenize=tokenize, threads=2
    )
    return Loader(index, **(defaults | options))


def take(loader, n, start=0):
    stream = loader.iterate(start)
    out = list(itertools.islice(stream, n))
    stream.close()
    return out


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def index(tmp_path):
    parts = (
        sample(
            f"{n}", task=TASKS[n % 3], instruction=f"edit {n}", instruction_zh=f"编辑 {n}",
            target=picture(value=n * 10),
        )
        for n in range(18)
    )  # fmt: skip
    return make_index(tmp_path, *parts)


def test_a_batch(index):
    (batch,) = take(loader_of(index, slots=3), 1)
    assert batch.pixels.shape == (4, 3, 64, 64, 3) and batch.pixels.dtype == np.uint8
    assert batch.sizes[0].tolist() == [[64, 64], [64, 64], [0, 0]]
    assert not batch.pixels[:, 2].any()
    assert batch.text[0].dtype == np.int32 and batch.text[1].dtype == np.bool_
    for row in range(4):
        n = int(batch.sample_id[row])
        assert abs(int(batch.pixels[row, 0, 5, 5, 0]) - n * 10) < 4
        assert abs(int(batch.pixels[row, 1, 5, 5, 0]) - 50) < 4
        assert batch.task[row] == (2, 1, 3)[n % 3]
        np.testing.assert_array_equal(batch.text[0][row], tokenize([f"edit {n}"])[0][0])


def test_resume_and_process_count_give_the_same_batches(index):
    straight = take(loader_of(index), 5)
    for a, b in zip(straight[2:], take(loader_of(index), 3, start=2), strict=True):
        same(a, b)
    halves = [take(loader_of(index, process_index=p, process_count=2), 5) for p in (0, 1)]
    for whole, first, second in zip(straight, *halves, strict=True):
        same(whole, jax.tree.map(lambda a, b: np.concatenate([a, b]), first, second))
    assert not np.array_equal(straight[0].sample_id, take(loader_of(index, seed=4), 1)[0].sample_id)


def test_worker_processes_give_the_same_batches(index):
    for a, b in zip(take(loader_of(index), 3), take(loader_of(index, workers=2), 3), strict=True):
        same(a, b)


def test_languages(index):
    texts = {}
    for language in ("en", "zh", "mixed"):
        batches = take(loader_of(index, language=language), 6)
        texts[language] = [ids for b in batches for ids in b.text[0].max(-1)]
    assert max(texts["en"]) < 256 and min(texts["zh"]) > 256
    assert min(texts["mixed"]) < 256 < max(texts["mixed"])


def test_thirteen_aspect_ratios_share_a_canvas(tmp_path):
    buckets = transforms.BUCKETS_TINY_MIXED
    index = make_index(
        tmp_path,
        *(sample(str(n), target=picture(2 * w, 2 * h)) for n, (w, h) in enumerate(buckets)),
    )
    (batch,) = take(loader_of(index, batch_size=12, buckets=buckets), 1)
    assert batch.pixels.shape == (12, 2, 96, 96, 3)
    for row, n in enumerate(batch.sample_id):
        w, h = buckets[n]
        assert batch.sizes[row].tolist() == [[h, w], [h, w]]
        assert batch.pixels[row, :, :h, :w].min() > 40
        assert not batch.pixels[row, :, h:].any() and not batch.pixels[row, :, :, w:].any()
    assert len(set(batch.sample_id.tolist())) == 12


def test_unreadable_samples_are_replaced_named_and_counted(tmp_path):
    parts = [sample(f"{n}", task=TASKS[n % 2]) for n in range(8)]
    parts[2] = sample("2", task=TASKS[0], target=broken())
    parts[5] = sample("5", task=TASKS[1], source=picture(mode="I;16", form="PNG"))
    index = make_index(tmp_path, *parts)
    log = tmp_path / "problems.jsonl"
    loader = loader_of(index, problems_path=log)
    batches = take(loader, 4)
    again = loader_of(index)
    for a, b in zip(batches, take(again, 4), strict=True):
        same(a, b)
    ids = np.concatenate([b.sample_id for b in batches])
    assert not {2, 5} & set(ids.tolist())
    np.testing.assert_array_equal(
        index.columns["task"][ids], np.concatenate([b.task for b in batches])
    )
    assert loader.report == again.report and "image mode I;16" in loader.report
    assert any(r.startswith("cannot decode") for r in loader.report)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {line["sample"] for line in lines} == {index.name(2), index.name(5)}
    assert len(lines) == loader.report.total()


def test_a_task_without_readable_samples_is_an_error(tmp_path):
    index = make_index(tmp_path, *(sample(str(n), task="swap", target=broken()) for n in range(3)))
    with pytest.raises(ValueError, match=r"'subject replacement' among 3 tried(.|\n)*a.tar:"):
        take(loader_of(index), 1)


def test_held_out_batch(index):
    train, held = split_held_out(index, 3, seed=0)
    loader = loader_of(train)
    batch = loader.batch_of(held)
    np.testing.assert_array_equal(batch.sample_id, held)
    assert loader.instruction(held[0]) == f"edit {held[0]}"
    drawn = {int(i) for b in take(loader, 12) for i in b.sample_id}
    assert not drawn & set(held.tolist()) and len(drawn) > 12


def test_bad_options(index):
    for options in (dict(language="fr"), dict(slots=0), dict(process_count=3)):
        with pytest.raises(ValueError, match=r"language|slots|divide"):
            loader_of(index, **options)


def test_pictures_have_captions_and_one_slot(tmp_path):
    parts = [sample(str(n), caption_target=f"picture {n}") for n in range(4)]
    index = build_index(write(tmp_path / "a.tar", *parts), layout="pictures", progress=False)
    (batch,) = take(loader_of(index, slots=1), 1)
    assert batch.pixels.shape[1] == 1 and (batch.task == 0).all()
    n = int(batch.sample_id[0])
    np.testing.assert_array_equal(batch.text[0][0], tokenize([f"picture {n}"])[0][0])
    with pytest.raises(ValueError, match="slots must be 1, not 2"):
        loader_of(index, slots=2)
