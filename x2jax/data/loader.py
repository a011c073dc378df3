"""Batches of edit pairs by number: the sampler's ids, read, decoded and fitted to a canvas."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags
from jaxtyping import Int, Int32, UInt8

from x2jax.data import records, tasks, transforms
from x2jax.data.batch import Batch
from x2jax.data.features import LANGUAGES, Features
from x2jax.data.index import Index
from x2jax.data.sampler import Sampler
from x2jax.edit_text import read

Tokenize = Callable[[list[str]], Any]
"""n texts -> a pytree of numpy arrays with a leading axis of n: `Batch.text`."""

ATTEMPTS = 64
"""Samples of a task that are tried in a row before it counts as unreadable."""

_STEPS = 1 << 40


@dataclasses.dataclass(frozen=True)
class Problem:
    """A sample that could not be read, and its replacement."""

    sample: str
    reason: str
    sample_id: int
    replaced_by: int


class Reader:
    """Reads samples of an index by position; holds no open file, so it can be pickled."""

    def __init__(
        self,
        index: Index,
        sampler: Sampler,
        buckets: Sequence[transforms.Bucket],
        slots: int,
        language: str,
        features: Features | None = None,
    ):
        self.index, self.sampler, self.buckets, self.slots = index, sampler, tuple(buckets), slots
        self.language, self.features = language, features
        self.parts = () if features is None else features.parts
        self.canvas = transforms.canvas_size(buckets)

    def __call__(self, position: int) -> dict[str, Any]:
        """The sample at a global position, step * batch size + place, or its replacement.

        Raises:
          ValueError: neither it nor the next samples of its task can be read.
        """
        wanted = self.sampler.position(*divmod(int(position), self.sampler.batch_size))
        task = int(self.index.columns["task"][wanted])
        ids = self.sampler.by_task[task]
        start, problems = int(np.searchsorted(ids, wanted)), []
        for attempt in range(min(ATTEMPTS, len(ids))):
            sample = int(ids[(start + attempt) % len(ids)])
            try:
                out = self.read(sample, int(position))
            except (transforms.BadImage, records.Dropped) as e:
                problems.append((sample, str(e)))
                continue
            return out | {
                "problems": [Problem(self.index.name(s), r, s, sample) for s, r in problems]
            }
        lines = "\n".join(f"  {self.index.name(s)}: {r}" for s, r in problems[:5])
        raise ValueError(
            f"no readable sample of task {tasks.TASKS[task]!r} among {len(problems)} tried; delete "
            f"or repair these shards, and index again:\n{lines}"
        )

    def read(self, sample: int, position: int = 0) -> dict[str, Any]:
        """Decodes a sample. `position` picks the language of a mixed run.

        Raises:
          BadImage, Dropped: the sample is broken. FileNotFoundError: its shard is gone.
        """
        out = {
            "sizes": self.sizes(sample),
            "task": np.int32(self.index.columns["task"][sample]),
            "sample_id": np.int32(sample),
            "text": "" if "text" in self.parts else self.instruction(sample, position),
        }
        if "moments" not in self.parts:
            out["pixels"] = self.pixels(sample)
        if self.features is not None:
            language = self._language(position)
            out |= self.features.read(sample, self.canvas, self.slots, language)
        return out

    def sizes(self, sample: int) -> Int32[np.ndarray, "S 2"]:
        """Valid (height, width) of a sample's images."""
        sizes = np.zeros((self.slots, 2), np.int32)
        sizes[: len(self._roles)] = self.bucket(sample)[::-1]
        return sizes

    def bucket(self, sample: int) -> transforms.Bucket:
        """Size that a sample's images are brought to: the target's, as the edit keeps the frame."""
        size = self.index.columns["target_size"][sample]
        return transforms.nearest_bucket(*map(int, size), self.buckets)

    def pixels(self, sample: int) -> UInt8[np.ndarray, "S Hc Wc 3"]:
        """Images of a sample on the canvas. Raises BadImage or FileNotFoundError as `read`."""
        pixels = np.zeros((self.slots, *self.canvas, 3), np.uint8)
        for slot, data in enumerate(self._bytes(sample, self._roles)):
            transforms.place(transforms.decode(data), self.bucket(sample), pixels[slot])
        return pixels

    def instruction(self, sample: int, position: int = 0) -> str:
        """Instruction or caption of a sample in the run's language.

        Raises:
          Dropped: its JSON is broken.
        """
        return records.choose(self.texts(sample), self._language(position))

    def texts(self, sample: int) -> dict[int, str]:
        """What conditions a sample, by language bit. Raises Dropped if its JSON is broken."""
        return records.texts(self._bytes(sample, ("record",))[0], self.index.layout)

    @property
    def _roles(self) -> tuple[str, ...]:
        return ("target", "source")[: self.slots]

    def _language(self, position: int) -> int:
        if self.language != "mixed":
            return LANGUAGES[self.language]
        rng = np.random.default_rng([self.sampler.seed, 3, position])
        return (records.ENGLISH, records.CHINESE)[int(rng.integers(2))]

    def _bytes(self, sample: int, names: Sequence[str]) -> list[bytes]:
        path = self.index.shards[self.index.columns["shard"][sample]]
        out = []
        with open(path, "rb") as file:
            for name in names:
                offset, size = map(int, self.index.columns[name][sample])
                file.seek(offset)
                out.append(file.read(size))
                if len(out[-1]) != size:
                    raise transforms.BadImage(f"shard ends inside the {name}: it has changed")
        return out


def _stack(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    lists = {k: [s[k] for s in samples] for k in ("text", "problems")}
    return {k: np.stack([s[k] for s in samples]) for k in samples[0] if k not in lists} | {
        # One object, so that no array is made of the words.
        "notes": json.dumps(
            {
                "text": lists["text"],
                "problems": [dataclasses.asdict(p) for ps in lists["problems"] for p in ps],
            }
        )
    }


class Loader:
    """Batches of one process of a run.

    The global batch of a step is a function of the index, the seed, the step and the global batch
    size; process p of P holds the p-th contiguous slice of it.

    Attributes:
      report: unreadable samples that this loader met, by reason.
      problems: the same, one by one.
      fingerprint: of the index.
    """

    def __init__(
        self,
        index: Index,
        *,
        seed: int,
        batch_size: int,
        buckets: Sequence[transforms.Bucket],
        tokenize: Tokenize,
        slots: int = 2,
        language: str = "en",
        alpha: float = 0.0,
        process_index: int = 0,
        process_count: int = 1,
        workers: int = 0,
        threads: int = 4,
        problems_path: str | Path | None = None,
        features: Features | None = None,
    ):
        """Prepares; reads nothing.

        Args:
          index: of the training samples.
          seed: of order and languages.
          batch_size: over all processes.
          buckets: (width, height) in pixels.
          tokenize: texts, or texts and pictures, to `Batch.text` (`x2jax.edit_text.read`); runs in
            this process.
          slots: image slots: target, source, then empty ones.
          language: "en", "zh" or "mixed"; the other one where a sample has only that.
          alpha: 0 draws tasks equally often, 1 by their number of samples.
          workers: reading processes; 0 reads in `threads` threads of this one.
          threads: per process.
          problems_path: file to which unreadable samples are appended, as JSON lines.
          features: what is read in place of images, and of texts if it has them.

        Raises:
          ValueError: a bad language, slots, or a batch that does not divide over the processes.
        """
        if language not in ("en", "zh", "mixed"):
            raise ValueError(f"language {language!r}: use 'en', 'zh' or 'mixed'")
        if slots < 1:
            raise ValueError(f"slots {slots}: needs at least the target")
        if slots > 1 and index.layout == records.PICTURES:
            raise ValueError(f"pictures have no sources: slots must be 1, not {slots}")
        if batch_size % process_count:
            raise ValueError(
                f"global batch {batch_size} does not divide over {process_count} processes"
            )
        self.index, self.tokenize, self.batch_size = index, tokenize, batch_size
        self.process_index, self.process_count = process_index, process_count
        self.workers, self.threads, self.problems_path = workers, threads, problems_path
        sampler = Sampler(index.by_task(), seed=seed, batch_size=batch_size, alpha=alpha)
        self.reader = Reader(index, sampler, buckets, slots, language, features)
        self.report: collections.Counter[str] = collections.Counter()
        self.problems: list[Problem] = []
        self.fingerprint = index.fingerprint

    def iterate(self, start_batch: int = 0) -> Iterator[Batch]:
        """This process's slices of batches `start_batch`, `start_batch` + 1, ... without end.

        Raises:
          ValueError: a task has no readable sample. FileNotFoundError: a shard is gone.
        """
        local = self.batch_size // self.process_count
        positions = _Positions(self.batch_size, self.process_index * local, local)
        data = (
            grain.MapDataset.range(start_batch * local, _STEPS)
            .map(_Compose(self.reader, positions))
            .batch(local, batch_fn=_stack)
        )
        options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=self.threads)
        stream = data.to_iter_dataset(options)
        if self.workers:
            if not flags.FLAGS.is_parsed():
                # grain's workers read absl flags, which only absl.app parses.
                flags.FLAGS.mark_as_parsed()
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=self.workers))
        batches = iter(stream)
        try:
            for raw in batches:
                # Workers hand over shared memory, which must be free before the interpreter ends.
                yield self._batch({k: np.array(v) for k, v in raw.items()} if self.workers else raw)
        finally:
            close = getattr(batches, "close", None)
            if close is not None:
                close()

    def batch_of(self, ids: Sequence[int] | Int[np.ndarray, "B"]) -> Batch:
        """These samples as a batch, whole on every process; `ids` may be held out.

        Raises:
          BadImage, Dropped: one of them cannot be read.
        """
        return self._batch(
            _stack([self.reader.read(int(i), int(i)) | {"problems": []} for i in ids])
        )

    def instruction(self, sample: int) -> str:
        """Instruction of a sample; of a mixed run, as `batch_of` has it."""
        return self.reader.instruction(int(sample), int(sample))

    def _batch(self, raw: dict[str, Any]) -> Batch:
        notes = json.loads(str(raw["notes"]))
        self._note([Problem(**p) for p in notes["problems"]])
        features = self.reader.features
        return Batch(
            pixels=raw.get("pixels"),
            sizes=raw["sizes"],
            text=(
                features.condition(raw)
                if features is not None and "text" in features.parts
                else read(self.tokenize, notes["text"], raw.get("pixels"), raw["sizes"])
            ),
            task=raw["task"],
            sample_id=raw["sample_id"],
            moments=None if features is None else features.moments(raw),
        )

    def _note(self, problems: list[Problem]) -> None:
        self.report.update(p.reason for p in problems)
        self.problems += problems
        if problems and self.problems_path is not None:
            with open(self.problems_path, "a", encoding="utf-8") as file:
                for p in problems:
                    file.write(json.dumps(dataclasses.asdict(p), ensure_ascii=False) + "\n")


@dataclasses.dataclass(frozen=True)
class _Positions:
    """Global position of a process's n-th sample."""

    batch_size: int
    first: int
    local: int

    def __call__(self, n: int) -> int:
        step, place = divmod(int(n), self.local)
        return step * self.batch_size + self.first + place


@dataclasses.dataclass(frozen=True)
class _Compose:
    """A picklable function for grain's workers."""

    reader: Reader
    positions: _Positions

    def __call__(self, n: int) -> dict[str, Any]:
        return self.reader(self.positions(n))
