"""Which samples make batch number `step`: arithmetic on (seed, step, batch size), no state.

Slots of two samples of one task are dealt from shuffled rounds, in which each task has its share,
so every batch has each of its tasks at least twice.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int64

ROUND = 256
"""Slots that a round is quantised to, before its common divisor is taken out."""


def multiplicities(counts: Mapping[int, int], alpha: float) -> dict[int, int]:
    """How often each task comes in a round.

    Args:
      counts: samples by task, all positive.
      alpha: 0 gives every task the same share, 1 a share in proportion to its samples.
    """
    weights = {t: float(n) ** alpha for t, n in sorted(counts.items())}
    scale = ROUND / sum(weights.values())
    raw = {t: max(1, round(w * scale)) for t, w in weights.items()}
    divisor = int(np.gcd.reduce(list(raw.values())))
    return {t: m // divisor for t, m in raw.items()}


class Sampler:
    """Closed form of the sample order.

    Every slot holds two samples of a task; an odd batch ends in a slot of three, and a batch of
    one has one slot of one. An epoch of a task goes through its samples in a fresh order and
    repeats none; what does not fill a whole slot at its end is left out of that epoch.
    """

    def __init__(
        self,
        by_task: Mapping[int, Int64[np.ndarray, "N"]],
        *,
        seed: int,
        batch_size: int,
        alpha: float = 0.0,
    ):
        """Takes sample ids by task.

        Raises:
          ValueError: no samples, or a batch size below 1.
        """
        self.by_task = {t: np.asarray(ids) for t, ids in sorted(by_task.items()) if len(ids)}
        if not self.by_task:
            raise ValueError("no samples to draw from; the index report says why they were dropped")
        if batch_size < 1:
            raise ValueError(f"batch size {batch_size}: needs at least 1")
        self.seed, self.batch_size = seed, batch_size
        self.slots = max(1, batch_size // 2)
        # DIFFERS: in an odd batch every slot reserves three samples and all but the last use two;
        # without the reserve the position in an epoch would depend on all earlier rounds.
        self.reserve = min(batch_size, 2 + batch_size % 2)
        shares = multiplicities({t: len(ids) for t, ids in self.by_task.items()}, alpha)
        self.shares = shares
        self._round_tasks = np.repeat(list(shares), list(shares.values()))
        self._round = functools.lru_cache(maxsize=64)(self._make_round)
        self._epoch = functools.lru_cache(maxsize=4 * len(shares))(self._make_epoch)

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_round", "_epoch")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._round = functools.lru_cache(maxsize=64)(self._make_round)
        self._epoch = functools.lru_cache(maxsize=4 * len(self.shares))(self._make_epoch)

    def _make_round(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Task of each slot of a round, and how often it came before in that round."""
        rng = np.random.default_rng([self.seed, 0, number])
        order = rng.permutation(self._round_tasks)
        before = np.zeros(len(order), np.int64)
        for task in self.shares:
            where = np.flatnonzero(order == task)
            before[where] = np.arange(len(where))
        return order, before

    def _make_epoch(self, task: int, number: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, 1, task, number])
        return rng.permutation(self.by_task[task])

    def position(self, step: int, place: int) -> int:
        """Sample id at `place` of batch `step`."""
        slot = min(place // 2, self.slots - 1)
        number, within = divmod(step * self.slots + slot, len(self._round_tasks))
        order, before = self._round(number)
        task = int(order[within])
        count = number * self.shares[task] + int(before[within])
        samples = len(self.by_task[task])
        epoch, turn = divmod(count, max(1, samples // self.reserve))
        at = turn * self.reserve + place - 2 * slot
        return int(self._epoch(task, epoch)[at % samples])

    def batch(self, step: int) -> Int64[np.ndarray, "B"]:
        """Sample ids of a global batch, in order."""
        return np.array([self.position(step, i) for i in range(self.batch_size)], np.int64)
