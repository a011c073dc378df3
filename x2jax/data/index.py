"""The table of usable samples: where each lies, what was dropped and why; held-out split."""

from __future__ import annotations

import collections
import dataclasses
import hashlib

import numpy as np

NAMES_KEPT = 1000
"""Dropped samples named per reason in the report; all are counted."""

COLUMNS = {
    "shard": np.int32,
    "task": np.uint8,
    "languages": np.uint8,
    "target": np.int64,
    "source": np.int64,
    "record": np.int64,
    "target_size": np.int32,
    "source_size": np.int32,
}
"""Columns of an index and their types."""


@dataclasses.dataclass
class Report:
    """What an index kept and dropped.

    Attributes:
      kept: samples by task name. dropped: samples by reason. names: of dropped samples, by reason.
      languages: samples that have an instruction in "en" and "zh".
      problems: (shard, what is wrong with it).
    """

    kept: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    dropped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    names: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    languages: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    problems: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def drop(self, reason: str, name: str) -> None:
        """Counts a dropped sample and keeps its name."""
        self.dropped[reason] += 1
        kept = self.names.setdefault(reason, [])
        if len(kept) < NAMES_KEPT:
            kept.append(name)

    def add(self, other: Report) -> None:
        """Adds the report of another shard."""
        self.kept += other.kept
        self.dropped += other.dropped
        self.languages += other.languages
        self.problems += other.problems
        for reason, names in other.names.items():
            kept = self.names.setdefault(reason, [])
            kept.extend(names[: NAMES_KEPT - len(kept)])

    def __str__(self) -> str:
        langs = ", ".join(f"{n} with {k} instruction" for k, n in sorted(self.languages.items()))
        lines = [f"index: kept {self.kept.total()} samples" + (f" ({langs})" if langs else "")]
        lines += [f"  {n:>9}  {name}" for name, n in self.kept.most_common()]
        lines += [f"index: dropped {self.dropped.total()}"]
        lines += [f"  {n:>9}  {reason}" for reason, n in self.dropped.most_common()]
        lines += [f"index: {shard}: {problem}" for shard, problem in self.problems]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Index:
    """Samples by position; N of them.

    Attributes:
      shards: paths of the tars.
      columns: by name, (N,) or (N, 2): shard number, task, language bits, (offset, size) of
        target, source and record in the shard (source (0, 0) where there is none), and
        (width, height) of target and source.
      stems: (N,) bytes, names of the samples in their shards.
      active: positions to train on; all but the held-out ones.
      report: of the making of this index.
      layout: what a sample is, one of `x2jax.data.records.LAYOUTS`.
    """

    shards: tuple[str, ...]
    columns: dict[str, np.ndarray]
    stems: np.ndarray
    active: np.ndarray
    report: Report
    layout: str = "edits"

    def __len__(self) -> int:
        return len(self.active)

    def name(self, sample: int) -> str:
        """SHARD:STEM of a position."""
        shard = self.shards[self.columns["shard"][sample]]
        return f"{shard}:{self.stems[sample].decode('utf-8', 'replace')}"

    def by_task(self) -> dict[int, np.ndarray]:
        """Active positions by task."""
        of = self.columns["task"][self.active]
        return {int(t): self.active[of == t] for t in np.unique(of)}

    @property
    def fingerprint(self) -> str:
        """Hash of what is in the index and active; not of where the shards lie."""
        h = hashlib.sha256()
        for array in (*(self.columns[k] for k in COLUMNS), self.stems, self.active):
            h.update(np.ascontiguousarray(array).tobytes())
        return h.hexdigest()[:16]


def split_held_out(index: Index, n: int, seed: int) -> tuple[Index, np.ndarray]:
    """Takes `n` samples out of training, as evenly over the tasks as they allow.

    Returns:
      The index without them, and their positions (n,), tasks in turn.

    Raises:
      ValueError: there are not `n` samples to spare; two of each task stay.
    """
    rng = np.random.default_rng([seed, 2])
    by_task = index.by_task()
    room = sum(max(0, len(ids) - 2) for ids in by_task.values())
    if n > room:
        raise ValueError(f"cannot hold out {n} samples: {room} can be spared of {len(index)}")
    spare = {
        t: list(rng.permutation(ids)[: max(0, min(n, len(ids) - 2))]) for t, ids in by_task.items()
    }
    taken: list[int] = []
    while len(taken) < n:
        turn = [int(ids.pop(0)) for ids in spare.values() if ids]
        taken += turn[: n - len(taken)]
    held = np.array(taken, np.int64)
    return dataclasses.replace(index, active=np.setdiff1d(index.active, held)), held
