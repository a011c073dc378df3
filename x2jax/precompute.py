"""Computes latents and text features once: `python -m x2jax.precompute --config FILE.py[:ARG]`.

Takes the config and the workdir of the training run that will read them, and writes
WORKDIR/features: posterior moments of every image (so that latents stay a draw) and, where AlignNet
is frozen, the text features of every instruction. The same command again goes on where it was
stopped. Each process writes shards of its own with its own devices: none waits for another.
"""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags
from tqdm import tqdm

from x2jax import recipes, sharding
from x2jax.alignnet import Condition
from x2jax.children import load_child
from x2jax.data import features, records, transforms
from x2jax.data.batch import Batch, Moments
from x2jax.data.loader import Reader
from x2jax.model import make_skeleton
from x2jax.recipes import precomputed
from x2jax.train import default_workdir
from x2jax.trained import fit, placed
from x2jax.trees import Params, child, fingerprint


class Sample(NamedTuple):
    """A sample as read.

    Attributes:
      pixels, sizes: as a batch has them.
      texts: asked language -> (the language it is there in, the text).
    """

    pixels: np.ndarray
    sizes: np.ndarray
    texts: dict[str, tuple[str, str]]


class Encoders:
    """The frozen encoders of a recipe on the devices of this process.

    Attributes:
      prints: fingerprint of the weights, by child.
      devices: how many there are; batches are multiples of it.
    """

    def __init__(self, recipe: Any, parts: tuple[str, ...]):
        names = precomputed.children(recipe, parts)
        self._skeleton = make_skeleton({n: recipe.configs[n] for n in names}, recipe.precision)
        self._mesh = sharding.make_mesh({"fsdp": -1}, jax.local_devices())
        self._rows = sharding.batch_sharding(self._mesh)
        self.devices = self._mesh.size
        by_path = sharding.param_shardings(self._skeleton.abstract, self._mesh)
        self._params: Params = {}
        for name in names:
            self._params |= load_child(self._skeleton, recipe.found, name, by_path)
        what = f"--config.init_from={recipe.config.init_from}"
        given = fit(precomputed.given(recipe.config, names), self._skeleton.abstract, what)
        self._params |= placed(given, self._params, by_path)
        self.prints = {n: fingerprint(child(self._params, n)) for n in names}
        self._dtype = jnp.dtype(recipe.config.precision.compute)
        self._moments = self._compiled(lambda model, batch: model.moments(batch))
        self._condition = self._compiled(lambda model, text: model.condition(text))

    def _compiled(self, of: Callable[[Any, Any], Any]) -> Callable[[Params, Any], Any]:
        def run(params, inputs):
            out = of(self._skeleton.merge(params), inputs)
            # The last layers compute in this dtype, so nothing is lost.
            return jax.tree.map(lambda x: x.astype(self._dtype), out)

        return jax.jit(run)

    def moments(self, batch: Batch) -> Moments:
        """Posteriors of a batch's pixels, in the dtype of the computation."""
        return self._call(self._moments, batch)

    def condition(self, text: Any) -> Condition:
        """Text features and pooled vectors of tokens, in the dtype of the computation."""
        return self._call(self._condition, text)

    def _call(self, run, inputs):
        with jax.set_mesh(self._mesh):
            return jax.device_get(run(self._params, jax.device_put(inputs, self._rows)))


class Work:
    """Reads, encodes and writes shards; later batches are read while one is encoded."""

    AHEAD = 2

    def __init__(self, reader: Reader, encoders: Encoders, tokenize: Any, meta: dict, batch: int):
        self.reader, self.encoders, self.tokenize = reader, encoders, tokenize
        self.meta, self.batch = meta, batch
        self.unreadable: collections.Counter[str] = collections.Counter()

    def run(self, shards: Sequence[tuple[Path, range]], pool: ThreadPoolExecutor) -> None:
        """Writes shards of samples, one after another."""
        groups = [r[k : k + self.batch] for _, r in shards for k in range(0, len(r), self.batch)]
        stream = self._read_ahead(groups, pool)
        with tqdm(total=sum(map(len, groups)), unit="sample", desc="precompute") as bar:
            for path, ids in shards:
                writer = features.ShardWriter(path)
                for _ in range(0, len(ids), self.batch):
                    for data in self.encode(next(stream)):
                        writer.write(data)
                        bar.update()
                writer.close()

    def _read_ahead(
        self, groups: Sequence[range], pool: ThreadPoolExecutor
    ) -> Iterator[list[Sample | str]]:
        waiting: collections.deque[list[Future]] = collections.deque()
        for n in range(len(groups) + self.AHEAD):
            if n < len(groups):
                waiting.append([pool.submit(self.read, i) for i in groups[n]])
            if n >= self.AHEAD:
                yield [f.result() for f in waiting.popleft()]

    def read(self, sample: int) -> Sample | str:
        """A sample, or why it cannot be read.

        Raises:
          FileNotFoundError: its shard is gone.
        """
        try:
            pixels, texts = self.reader.pixels(sample), {}
            if precomputed.TEXT in self.meta["parts"]:
                found = self.reader.texts(sample)
                there = {k: found[bit] for k, bit in features.LANGUAGES.items() if bit in found}
                for asked in self.meta["languages"]:
                    language = asked if asked in there else next(iter(there))
                    texts[asked] = language, there[language]
        except (transforms.BadImage, records.Dropped) as e:
            return str(e)
        return Sample(pixels, self.reader.sizes(sample), texts)

    def encode(self, samples: Sequence[Sample | str]) -> list[bytes]:
        """Records of samples."""
        good = [s for s in samples if not isinstance(s, str)]
        self.unreadable.update(s for s in samples if isinstance(s, str))
        out = iter(self._records(good) if good else ())
        return [features.problem(s) if isinstance(s, str) else next(out) for s in samples]

    def _records(self, good: list[Sample]) -> list[bytes]:
        # Always a whole batch: one compiled program.
        full = good + [good[-1]] * (self.batch - len(good))
        sizes = np.stack([s.sizes for s in full])
        pixels = np.stack([s.pixels for s in full])
        none: Any = None
        images: Any = self.encoders.moments(
            Batch(pixels, sizes, text=none, task=none, sample_id=none)
        )
        texts: dict[str, Any] = {
            asked: self.encoders.condition(self.tokenize([s.texts[asked][1] for s in full]))
            for asked in full[0].texts
        }
        factor = self.meta["factor"]

        def slots(row: int) -> dict[int, dict[str, np.ndarray]]:
            return {
                n: {k: x[row, n, : h // factor, : w // factor]
                    for k, x in zip(features.SLOT_ARRAYS, images, strict=True)}
                for n, (h, w) in enumerate(sizes[row]) if h
            }  # fmt: skip

        def words(row: int) -> dict[str, dict[str, np.ndarray]]:
            return {
                full[row].texts[asked][0]: dict(
                    zip(features.TEXT_ARRAYS, (x[row] for x in condition), strict=True)
                )
                for asked, condition in texts.items()
            }

        return [features.record(slots(row), words(row)) for row in range(len(good))]


def precompute(
    config: Any, workdir: Path, *, batch: int = 0, shard: int = 256, share: tuple[int, int] = (0, 1)
) -> Path:
    """Writes the features of a training run; returns their folder.

    Args:
      config: of the training run.
      workdir: of the training run.
      batch: samples at once on this process; 0 for one a device, at least 8.
      shard: samples a file, for features that are begun here.
      share: (p, P): shards p, p + P, p + 2 P, ...

    Raises:
      ValueError: a recipe that cannot read features, features of another run in the folder, or a
        batch that does not divide over the devices. As `x2jax.recipes.build` for the rest.
    """
    cls: Any = recipes.recipe_class(config.recipe)
    if not getattr(cls, "precomputes", False):
        raise ValueError(f"the recipe {config.recipe!r} reads no features: train without them")
    cls.require(config)
    recipe = cls.open(config)
    data = recipe.open_data(workdir)
    parts = precomputed.parts_of(recipe)
    encoders = Encoders(recipe, parts)
    batch = batch or max(8, encoders.devices)
    if batch % encoders.devices:
        raise ValueError(f"--batch={batch} does not divide over {encoders.devices} devices")
    folder = Path(config.features).expanduser() if config.features else workdir / "features"
    meta = features.begin(
        folder,
        {
            "version": features.VERSION,
            "made_of": {"samples": data.about, **precomputed.made_of(recipe, parts)},
            "weights": encoders.prints,
            "parts": list(parts),
            "languages": features.languages(config.text.language),
            "dtype": config.precision.compute,
            "factor": recipe.configs["vae"].factor,
            "samples": len(data.index.stems),
            "shard": shard,
        },
    )
    paths = features.shard_paths(folder, meta)
    mine = range(share[0], len(paths), share[1])
    todo = [(paths[n], _ids(n, meta)) for n in mine if not paths[n].is_file()]
    print(
        f"{folder}: {' and '.join(parts)} of {meta['samples']} samples in {len(paths)} shards; "
        f"{len(todo)} of this process's {len(mine)} to do",
        flush=True,
    )
    work = Work(data.reader, encoders, recipe.tokenizer(), meta, batch)
    with ThreadPoolExecutor(max(4, config.workers)) as pool:
        work.run(todo, pool)
    for reason, count in work.unreadable.most_common():
        print(f"  {count:>9}  unreadable: {reason}")
    return folder


def _ids(shard: int, meta: Mapping[str, Any]) -> range:
    """Samples of a shard."""
    return range(shard * meta["shard"], min((shard + 1) * meta["shard"], meta["samples"]))


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    workdir = Path(flags.FLAGS.workdir) if flags.FLAGS.workdir else default_workdir(path)
    share = jax.process_index(), jax.process_count()
    if flags.FLAGS.share:
        share = tuple(map(int, flags.FLAGS.share.split("/")))
    folder = precompute(
        flags.FLAGS.config, workdir, batch=flags.FLAGS.batch, shard=flags.FLAGS.shard, share=share
    )
    print(f"done; python -m x2jax.train with this config and --workdir {workdir} reads {folder}")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Training config, as FILE.py[:ARG].")
    flags.DEFINE_string("workdir", "", "That of the training run; default runs/CONFIG[-ARG].")
    flags.DEFINE_integer("batch", 0, "Samples at once; default one a device, at least 8.")
    flags.DEFINE_integer("shard", 256, "Samples a file.")
    flags.DEFINE_string(
        "share", "", "p/P: the p-th of P shares; default this process's of the job."
    )
    flags.mark_flag_as_required("config")
    app.run(main)
