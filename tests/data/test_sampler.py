import collections
import pickle

import numpy as np
import pytest

from x2jax.data.sampler import Sampler, multiplicities


def make(counts, batch_size, seed=0, alpha=0.0):
    starts = np.cumsum([0, *counts.values()])
    ids = {t: np.arange(a, a + n) for (t, n), a in zip(counts.items(), starts, strict=False)}
    return Sampler(ids, seed=seed, batch_size=batch_size, alpha=alpha)


def tasks_of(sampler, ids):
    return [next(t for t, own in sampler.by_task.items() if i in own) for i in ids]


@pytest.mark.parametrize("batch_size", [2, 3, 4, 7, 12])
def test_every_task_of_a_batch_comes_at_least_twice(batch_size):
    sampler = make({1: 9, 2: 30, 5: 11}, batch_size)
    for step in range(40):
        ids = sampler.batch(step)
        counts = collections.Counter(tasks_of(sampler, ids))
        assert sum(counts.values()) == batch_size and min(counts.values()) >= 2
        for a, b in zip(ids[0::2], ids[1::2], strict=False):
            assert a != b


@pytest.mark.parametrize("batch_size", [1, 2, 5, 6])
def test_no_repeats_in_an_epoch_and_tasks_balanced(batch_size):
    sampler = make({1: 8, 2: 16, 3: 33}, batch_size)
    seen, drawn = collections.defaultdict(list), collections.Counter()
    for step in range(60):
        for i, t in zip(sampler.batch(step), tasks_of(sampler, sampler.batch(step)), strict=True):
            seen[t].append(int(i))
            drawn[t] += 1
    if batch_size % 2 == 0 or batch_size == 1:
        assert max(drawn.values()) - min(drawn.values()) <= 2
        whole = 2 if batch_size > 1 else 1
        for t, ids in seen.items():
            n = len(sampler.by_task[t]) // whole * whole
            epochs = [ids[k : k + n] for k in range(0, len(ids), n)]
            assert all(len(set(e)) == len(e) for e in epochs)
            if len(epochs) > 2:
                assert epochs[0] != epochs[1]


def test_closed_form_seed_and_pickle():
    a, b = make({1: 50, 2: 70}, 6), make({1: 50, 2: 70}, 6)
    far = a.batch(123_456)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(b)).batch(123_456), far)
    assert not np.array_equal(make({1: 50, 2: 70}, 6, seed=1).batch(123_456), far)


def test_shares():
    assert multiplicities({1: 10, 2: 90}, 0.0) == {1: 1, 2: 1}
    shares = multiplicities({1: 10, 2: 90}, 1.0)
    assert abs(shares[2] / shares[1] - 9) < 0.2
    assert multiplicities({1: 1, 2: 10**7}, 1.0)[1] == 1
    sampler = make({1: 10, 2: 90}, 2, alpha=1.0)
    drawn = collections.Counter(t for s in range(256) for t in tasks_of(sampler, sampler.batch(s)))
    assert abs(drawn[2] / drawn[1] - 9) < 0.5


def test_few_samples_and_none():
    assert make({4: 1}, 4).batch(3).tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="no samples"):
        Sampler({}, seed=0, batch_size=2)
