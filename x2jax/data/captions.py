"""Batches of captions for two conditionings: a function of (seed, position) alone."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from jaxtyping import Array, Int32

from x2jax.data.caption_index import CaptionIndex, build_index
from x2jax.data.tiny_world import count_of

Tokenize = Callable[[list[str]], Any]

_STEPS = 1 << 40


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CaptionBatch:
    """Captions as two models read them: numpy arrays from the loader, jax arrays in the step."""

    teacher: Any  # what `x2jax.model.Model.condition` takes; its type says by which encoders
    student: Any  # the same captions
    sample_id: Int32[Array, "B"]  # number in the index


class Order:
    """Which caption stands at a position: every epoch goes through all of them in a fresh order.

    Captions that are held out are left out wherever their text occurs.

    Attributes:
      held: numbers of the held-out captions, (held_out,); their texts differ.
      excluded: numbers of all captions with these texts.
      count: captions of an epoch.
    """

    def __init__(self, index: CaptionIndex, held_out: int, seed: int):
        """Chooses the held-out captions.

        Raises:
          ValueError: there are not enough captions of different text to spare.
        """
        hashes = index.entries["hash"]
        shuffled = self._shuffled(len(index), seed, salt=1)
        texts: dict[int, int] = {}
        for k in range(len(index) if held_out else 0):
            number = int(shuffled[k])
            texts.setdefault(int(hashes[number]), number)
            if len(texts) == held_out:
                break
        self.held = np.array(list(texts.values()), np.int64)
        self.excluded = np.flatnonzero(np.isin(hashes, np.array(list(texts), np.uint64)))
        self.count = len(index) - len(self.excluded)
        if len(texts) < held_out or self.count < 1:
            raise ValueError(
                f"cannot hold out {held_out} captions of {len(index)}: {len(texts)} differ, and "
                f"{self.count} would be left to train on"
            )
        # The n-th caption that is not excluded is n plus the excluded ones before it.
        self._ranks = self.excluded - np.arange(len(self.excluded))
        self._order = self._shuffled(self.count, seed, salt=0)

    @staticmethod
    def _shuffled(count: int, seed: int, salt: int) -> Any:
        seed = int(np.random.default_rng([seed, 4, salt]).integers(1 << 31))
        return grain.MapDataset.range(count).seed(seed).shuffle().repeat()

    def number(self, position: int) -> int:
        """Number in the index of the caption at a global position."""
        rank = int(self._order[position])
        return rank + int(np.searchsorted(self._ranks, rank, side="right"))


class CaptionData:
    """Training and held-out batches of captions.

    Attributes:
      held_out: a fixed batch of captions that are never trained on; this process's share.
      held_out_instructions: its captions.
      fingerprint: of all captions and of which are held out.
    """

    def __init__(
        self,
        data: str,
        workdir: Path,
        *,
        teacher: Tokenize,
        student: Tokenize,
        seed: int,
        batch_size: int,
        held_out: int,
        key: str,
    ):
        """Opens or makes the index below `workdir`.

        Args:
          data: globs, separated by commas, of caption files; "tiny:N" for N captions of the tiny
            world.
          workdir: of the run.
          teacher, student: list of captions -> what `Model.condition` takes, as numpy arrays.
          seed: of the order and of what is held out.
          batch_size: over all processes.
          held_out: captions that are never trained on.
          key: JSON key, tar suffix or parquet column of the captions.

        Raises:
          FileNotFoundError, ValueError: as `build_index`; too few captions to hold any out; a batch
            that does not divide over the processes.
        """
        processes = jax.process_count()
        for what, size in (("batch_size", batch_size), ("held_out", held_out)):
            if size % processes:
                raise ValueError(
                    f"--config.{what}={size} does not divide over {processes} processes"
                )
        self.batch_size, self._teacher, self._student = batch_size, teacher, student
        files = written(data, workdir).split(",")
        self.index = build_index(files, workdir / "index", key)
        self.order = Order(self.index, held_out, seed)
        own = slice(*(held_out * (jax.process_index() + k) // processes for k in (0, 1)))
        numbers = self.order.held[own]
        self.held_out_instructions = [self.index.read(n) for n in numbers]
        self.held_out = self._batch(numbers, self.held_out_instructions)
        self.fingerprint = f"{self.index.fingerprint}-{self.order.count}"

    def iterate(self, start: int) -> Iterator[CaptionBatch]:
        """This process's slices of batches `start`, `start` + 1, ... without end.

        Raises:
          ValueError: a file has changed since it was indexed.
        """
        local = self.batch_size // jax.process_count()
        first = jax.process_index() * local

        def read(n: int) -> tuple[int, str]:
            step, place = divmod(int(n), local)
            number = self.order.number(step * self.batch_size + first + place)
            return number, self.index.read(number)

        samples = grain.MapDataset.range(start * local, _STEPS).map(read)
        rows = samples.batch(local, batch_fn=list)
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        for group in rows.to_iter_dataset(options):
            numbers, texts = zip(*group, strict=True)
            yield self._batch(np.array(numbers), list(texts))

    def tokenize(self, texts: list[str]) -> tuple[Any, Any]:
        """What teacher and student read."""
        return self._teacher(texts), self._student(texts)

    def _batch(self, numbers: np.ndarray, texts: list[str]) -> CaptionBatch:
        return CaptionBatch(*self.tokenize(texts), np.asarray(numbers, np.int32))


def written(data: str, workdir: Path) -> str:
    """Globs of a caption data set; "tiny:N" writes N captions of the tiny world below `workdir`.

    Raises:
      ValueError: "tiny:" without a number.
    """
    count = count_of(data)
    if count is None:
        return data
    from x2jax.tiny import captions, world

    path = workdir / "data" / f"captions-{count}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng([count, 5])
        temporary = path.with_suffix(".part")
        with open(temporary, "w", encoding="utf-8") as out:
            for _ in range(count):
                text = captions.caption(world.sample_scene(rng), rng, "en")
                out.write(json.dumps({"caption": text}) + "\n")
        temporary.rename(path)
    return str(path)
