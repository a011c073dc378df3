"""Training and held-out batches of a data set of edits or pictures, as recipes ask for them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from x2jax.data import records, transforms
from x2jax.data.batch import Batch
from x2jax.data.features import Features
from x2jax.data.loader import Loader, Reader
from x2jax.data.tar_index import build_index, split_held_out
from x2jax.data.tiny_world import count_of
from x2jax.encoders.tokenize import TextTokenizer

BUCKETS = {
    "512": transforms.BUCKETS_512,
    "1024": transforms.BUCKETS_1024,
    "tiny": transforms.BUCKETS_TINY,
    "tiny-mixed": transforms.BUCKETS_TINY_MIXED,
}


class EditData:
    """Opens tar shards, or renders the tiny world's.

    Attributes:
      index: of all samples, the held-out ones too.
      fingerprint: of the samples that are trained on.
      about: what features of the samples depend on before any weights do.
      features: what was computed before; None without.
      held_out: a fixed batch that is never trained on, the same on every process's first host.
      held_out_instructions: its instructions.
    """

    def __init__(
        self,
        data: str,
        workdir: Path,
        tokenize: TextTokenizer,
        *,
        seed: int,
        batch_size: int,
        held_out: int,
        language: str,
        workers: int,
        buckets: str,
        slots: int,
        alpha: float,
        layout: str = records.EDITS,
        features: Path | None = None,
        made_of: Mapping[str, Any] | None = None,
    ):
        """Indexes the data and reads the held-out batch.

        Args:
          layout: what a sample is, one of `records.LAYOUTS`.
          features: folder of what `x2jax.precompute` made; None reads pictures and texts.
          made_of: by part of the features that is read, what it must have been made of.

        Raises:
          ValueError: unknown buckets or language, too few samples, or features of another run.
        """
        if buckets not in BUCKETS:
            raise ValueError(f"unknown buckets {buckets!r}: use one of {', '.join(BUCKETS)}")
        self.buckets = BUCKETS[buckets]
        self.slots = slots
        found = shards(data, workdir, self.buckets)
        self.index = build_index(found, workdir / "index", layout=layout)
        self.about = {
            "image.buckets": [list(b) for b in self.buckets],
            "image.slots": slots,
            "contents of data": self.index.fingerprint,
        }
        self.features = None
        if features is not None:
            self.features = Features(features, {"samples": self.about, **(made_of or {})}, language)
        index, ids = split_held_out(self.index, held_out, seed)
        options = dict(
            buckets=self.buckets, tokenize=tokenize, slots=slots, seed=seed, features=self.features
        )
        self._loader = Loader(
            index,
            batch_size=batch_size,
            language=language,
            alpha=alpha,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=workers,
            problems_path=workdir / "unreadable_samples.jsonl",
            **options,
        )
        # English in the grids: the font that draws them has no other script.
        fixed = Loader(index, batch_size=held_out, language="en", **options)
        share = slice(
            jax.process_index() * held_out // jax.process_count(),
            (jax.process_index() + 1) * held_out // jax.process_count(),
        )
        self.held_out: Batch = fixed.batch_of(ids[share])
        self.held_out_instructions = [fixed.instruction(i) for i in ids[share]]
        self.fingerprint = self._loader.fingerprint

    @property
    def reader(self) -> Reader:
        """Reads samples of the index by position."""
        return self._loader.reader

    def iterate(self, start: int) -> Iterator[Batch]:
        """Batches of this process from the `start`-th on."""
        return self._loader.iterate(start)

    def check(self, *, cell: int, tokens: int, slots: int) -> None:
        """Raises ValueError where the buckets do not fit the VAE's grid or the token budget.

        Args:
          cell: pixels of a packed token along an edge.
          tokens: image-stream budget of a sample.
          slots: images of a sample that become tokens.
        """
        uneven = [b for b in self.buckets if b[0] % cell or b[1] % cell]
        if uneven:
            raise ValueError(f"buckets {uneven} are no multiples of {cell} px, one packed token")
        need = slots * max(w * h // cell**2 for w, h in self.buckets)
        if need > tokens:
            raise ValueError(
                f"--config.objective.tokens={tokens} is too small: {slots} images a sample "
                f"take up to {need} tokens"
            )


def shards(data: str, workdir: Path, buckets) -> str:
    """The glob of a data set; "tiny:N" renders N pairs of the tiny world below `workdir`.

    Raises:
      ValueError: "tiny:" without a number.
    """
    count = count_of(data)
    if count is None:
        return data
    from x2jax.tiny.shards import write_shards

    folder = workdir / "data" / f"{count}"
    if not (folder / "complete").exists():
        write_shards(folder, count, seed=0, sizes=tuple(buckets))
        (folder / "complete").touch()
    return str(folder / "*" / "*" / "*.tar")
