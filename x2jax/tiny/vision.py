"""Trains the tiny Qwen2.5-VL's vision tower: `python -m x2jax.tiny.vision --family DIR`.

Language model, AlignNet and FLUX stay as they are; the tower learns, and the embeddings of the two
tokens around a picture. In two lessons:

words     a token of the tower shall look like the words for what its cell shows
          (`x2jax.tiny.sights`).
pictures  what pictures are for in X2I: one stands in the message that conditions FLUX, which draws
          it; the gradient goes through FLUX, AlignNet and language model. What FLUX makes of the
          caption is the greater part of the target.

The shipped tower had 15 minutes of words and 22 of pictures, on one busy core. The language model
is older than the tokens of pictures: they were appended to its vocabulary.

`--measure` only prints what DIR has learnt: flow loss of unseen pictures with the picture itself in
the message, another one, or a caption, on the same noise. `--draw FILE` shows what FLUX draws.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image
from tqdm import tqdm

from x2jax import samples
from x2jax.encoders.qwen2_5_vl import QWEN_TINY_VISION, VisionInputs
from x2jax.encoders.tokenize import TextTokenizer, open_tokenizer
from x2jax.model import Model
from x2jax.sources import TINY
from x2jax.tiny import base, captions, draw, family, seeing, sights
from x2jax.tiny.captioned import EDGE, TEXT
from x2jax.tiny.seeing import Seen
from x2jax.trees import Params, Skeleton, child

SURE = 6.0
"""How sure of a word a whole step towards it makes, in nats over the others of its kind."""
TEACH = 4.0
"""Weight in the second lesson of what FLUX makes of the caption."""
HARD = {"shape": 1.5, "place": 1.5}
"""Kinds of words that weigh more in the first lesson: they are learnt late."""


def words_loss(skeleton: Skeleton, words: sights.Words):
    """Function: squared distance to the targets, and cross-entropy of the true words by kind."""

    def loss(params, batch, _):
        vision, seen = batch
        tokens = skeleton.merge(params).mllm.visual(vision)
        total = 4 * jnp.square(tokens - seen.targets_BMD).sum(-1).mean()
        for kind, truth_BM in seen.truth.items():
            there = truth_BM >= 0
            each = optax.softmax_cross_entropy_with_integer_labels(
                SURE * sights.likeness(tokens, words, kind), jnp.maximum(truth_BM, 0)
            )
            mean = (each * there).sum() / jnp.maximum(there.sum(), 1)
            total += HARD.get(kind, 1.0) * mean / len(seen.truth)
        return total

    return loss


def minimise(
    loss: Callable,
    frozen: Params,
    trained: Params,
    draw_batch: Callable[[np.random.Generator], Any],
    args: argparse.Namespace,
    minutes: float,
    rate: float,
) -> Params:
    """Adam until the steps or the minutes are over; the rate falls with their share."""
    schedule = optax.warmup_cosine_decay_schedule(0, rate, 0.03, 1.0, rate / 50)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1.0, weight_decay=1e-3))

    @jax.jit
    def step(trained, opt, frozen, batch, key, share):
        value, grads = jax.value_and_grad(lambda own: loss(seeing.whole(frozen, own), batch, key))(
            trained
        )
        updates, opt = tx.update(grads, opt, trained)
        updates = jax.tree.map(lambda u: schedule(share) * u, updates)
        return optax.apply_updates(trained, updates), opt, value

    opt, rng, begun = tx.init(trained), np.random.default_rng(args.seed), time.monotonic()
    bar, mean = tqdm(range(args.steps), mininterval=10), None
    for k in bar:
        share = max(k / args.steps, (time.monotonic() - begun) / (60 * minutes))
        if share >= 1:
            break
        key = jax.random.fold_in(jax.random.key(args.seed), k)
        trained, opt, value = step(trained, opt, frozen, draw_batch(rng), key, share)
        mean = float(value) if mean is None else 0.98 * mean + 0.02 * float(value)
        bar.set_postfix(loss=f"{mean:.4f}")
    return trained


def learn_words(root: Path, skeleton, frozen: Params, trained: Params, args) -> Params:
    """The first lesson; prints how many words are right on pictures that it has not seen."""
    embedding = np.asarray(frozen[seeing.EMBEDDING])
    words = sights.words_of(open_tokenizer(root / "qwen"), embedding)
    if args.fresh:
        middle = jnp.asarray(words.middle_D)
        trained |= {seeing.AROUND: jnp.tile(middle, (2, 1))}
        trained |= {seeing.TOWER + "merger/mlp_out/bias": middle}
    scenes, pixels = seeing.scenes(args.seed + 5, args.pictures + 256)
    seen = sights.look(scenes, words, EDGE, seeing.ROWS)
    vision: Any = seeing.messages(root, list(pixels)).vision
    both = (vision, seen)

    def draw_batch(rng):
        rows = rng.integers(0, args.pictures, 4 * args.batch)
        return seeing.take(both, rows)

    loss = words_loss(skeleton, words)
    trained = minimise(loss, frozen, trained, draw_batch, args, args.minutes, 3e-3)

    @jax.jit
    def tokens(weights, vision: VisionInputs):
        return skeleton.merge(weights).mllm.visual(vision)

    vision, seen = seeing.take(both, slice(args.pictures, None))
    found = tokens(seeing.whole(frozen, trained), vision)
    for kind, right in sights.nearest(np.asarray(found), seen, words).items():
        print(f"held-out {kind}: {right:.1%} right, {1 / len(sights.KINDS[kind]):.1%} by chance")
    return trained


def learn_pictures(root: Path, skeleton, frozen: Params, trained: Params, args) -> Params:
    """The second lesson."""
    weights = seeing.whole(frozen, trained)
    data = seeing.see(root, skeleton, weights, args.seed + 20, args.pictures)

    told, _ = captions_of(root, data, args.seed)

    def draw_batch(rng):
        rows = rng.integers(0, args.pictures, args.batch)
        return *data.rows(rows), seeing.take(told, rows)

    loss = seeing.flow_loss(skeleton, base.NOISY, TEACH)
    return minimise(loss, frozen, trained, draw_batch, args, args.minutes, args.rate)


def captions_of(root: Path, seen: Seen, seed: int = 0):
    """English captions of scenes, for the language model."""
    rng = np.random.default_rng(seed)
    texts = [captions.caption(s, rng) for s in seen.scenes]
    return TextTokenizer(root / "qwen", TEXT)(texts), texts


def measure(root: Path, skeleton: Skeleton, weights: Params, count: int = 256) -> dict[str, float]:
    """Flow loss of unseen pictures by what the message holds, on the same noise."""
    held = seeing.see(root, skeleton, weights, 1, count)
    text, _ = captions_of(root, held)
    loss = jax.jit(seeing.flow_loss(skeleton))

    def with_message(inputs, shift: int = 0) -> float:
        parts = []
        for k in range(0, count, 64):
            rows = np.arange(k, min(k + 64, count))
            shown = seeing.take(inputs, (rows + shift) % count)
            batch = (held.mean[rows], held.logvar[rows], shown)
            parts.append(loss(weights, batch, jax.random.key(k)))
        return float(np.mean(parts))

    return {
        "the picture": with_message(held.messages),
        "another picture": with_message(held.messages, 1),
        "its caption": with_message(text),
        "another caption": with_message(text, 1),
    }


def show(root: Path, skeleton: Skeleton, weights: Params, out: Path, count: int, seed: int) -> None:
    """A grid: unseen pictures, what FLUX draws from them, and from their captions."""
    seen = seeing.see(root, skeleton, weights, seed, count)
    text, words = captions_of(root, seen)
    rows = EDGE // 8
    noise = jax.random.normal(jax.random.key(seed), (count, rows * rows, 64))

    def run(weights, inputs):
        model: Model = skeleton.merge(weights)
        options = dict(steps=28, guidance=3.0)
        return draw.pictures(model, model.condition(inputs), noise, **options)

    made = [samples.to_uint8(jax.jit(run)(weights, x)) for x in (seen.messages, text)]
    drawn = [(words[k], [seen.pixels[k], made[0][k], made[1][k]]) for k in range(count)]
    titles = ("shown", "from it", "from the caption")
    Image.fromarray(samples.draw(drawn, titles)).save(out)


LESSONS = {"words": learn_words, "pictures": learn_pictures}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", type=Path, default=TINY, help="default: the shipped one")
    parser.add_argument("--lesson", choices=LESSONS, nargs="*", default=list(LESSONS))
    parser.add_argument("--steps", type=int, default=4000, help="of a lesson")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of a lesson, at most")
    parser.add_argument("--batch", type=int, default=8, help="words have 4 times that")
    parser.add_argument("--pictures", type=int, default=4096)
    parser.add_argument("--rate", type=float, default=7e-4, help="of the second lesson")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="begin with a new tower")
    parser.add_argument("--measure", action="store_true", help="only print what DIR has learnt")
    parser.add_argument("--draw", type=Path, help="only draw, into this PNG")
    args = parser.parse_args()
    skeleton, frozen, trained = seeing.open_model(args.family, args.fresh, args.seed)
    if args.draw:
        show(args.family, skeleton, seeing.whole(frozen, trained), args.draw, 8, 77)
        return
    for lesson in () if args.measure else args.lesson:
        trained = LESSONS[lesson](args.family, skeleton, frozen, trained, args)
        weights = child(seeing.whole(frozen, trained), "mllm")
        family.write_qwen(weights, args.family, "bfloat16", QWEN_TINY_VISION)
    weights = seeing.whole(frozen, trained)
    for name, value in measure(args.family, skeleton, weights).items():
        print(f"held-out flow loss with {name}: {value:.4f}")


if __name__ == "__main__":
    main()
