"""Trains the tiny FLUX with all that conditions it: `python -m x2jax.tiny.base --family DIR`.

Text to image on captioned scenes: rectified flow; FLUX, T5, CLIP and AlignNet train together, the
autoencoder and the language model stay as `--family` has them. One half of a batch is conditioned
by T5 and CLIP, the other by AlignNet, so one FLUX understands both. It never sees a source image;
that is what the adapters learn.

Training goes on from the weights in DIR; `--fresh` begins anew. `x2jax.tiny.draw` shows what it
learnt. The recipe for real bases is a later issue.
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from x2jax import flow
from x2jax.alignnet import Condition
from x2jax.children import MLLMConfig, Precision, find_sources, load_child
from x2jax.encoders.clip import CLIP_TINY
from x2jax.encoders.qwen2_5_vl import QWEN_TINY
from x2jax.encoders.t5 import T5_TINY
from x2jax.encoders.vae import VAEConfig
from x2jax.flux import FLUX_TINY, TARGET, ImageStream
from x2jax.flux.latents import patchify
from x2jax.model import Model, make_skeleton
from x2jax.sharding import make_mesh, param_shardings
from x2jax.sources import read_config
from x2jax.tiny import family
from x2jax.tiny.captioned import EDGE, LANGUAGES, Examples, Texts, Tokenizers, encoded, scenes
from x2jax.trees import Params, Skeleton, child, matches, prefixed

TRAINS = {
    "flux": "flux/transformer",
    "alignnet": "alignnet",
    "t5": "flux/text_encoder_2",
    "clip": "flux/text_encoder",
}
"""Child -> its folder in the family."""
FROZEN = ("vae", "mllm")
ZERO = (r"flux/.*/lin/kernel", r"flux/final_layer/.*/kernel")
"""Zero at the start, as in DiT: every block begins as the identity."""
SCALES = (
    (r"t5/shared/embedding", lambda shape: 1.0),
    (r"t5/position_bias/embedding", lambda shape: shape[0] ** -0.5),
    (r"t5/blocks/attn/q/kernel", lambda shape: (shape[-2] * T5_TINY.head_dim) ** -0.5),
    (r"clip/\w+_embedding/embedding", lambda shape: 0.3),
    (r"alignnet/conv/kernel", lambda shape: float(np.prod(shape[-4:-1])) ** -0.5),
    (r".*", lambda shape: shape[-2] ** -0.5),
)
"""Standard deviations at the start by path; the last is one over the root of the fan-in."""
NOISY = -1.0
"""Mean of the logit-normal u in training: the text matters where there is mostly noise."""


def open_family(root: Path, seed: int = 0, fresh: bool = False):
    """(skeleton, frozen weights, trainable weights). What has no folder yet is initialised.

    Raises:
      FileNotFoundError: the autoencoder or the language model is missing.
    """
    configs = {
        "flux": FLUX_TINY,
        "vae": VAEConfig.from_diffusers(read_config(root / "flux" / "vae")),
        "mllm": MLLMConfig(QWEN_TINY),
        "alignnet": family.ALIGNNET_TINY,
        "t5": T5_TINY,
        "clip": CLIP_TINY,
    }
    skeleton = make_skeleton(configs, Precision("float32", "float32"))
    by_path = param_shardings(skeleton.abstract, make_mesh({"fsdp": 1}, jax.devices()[:1]))
    options = {"flux": str(root / "flux"), "mllm": str(root / "qwen")}
    options["alignnet"] = str(root / "alignnet")
    frozen: Params = {}
    params: Params = {}
    for k, name in enumerate(configs):
        if name in TRAINS and (fresh or not (root / TRAINS[name]).is_dir()):
            abstract = prefixed(child(skeleton.abstract, name), name)
            params |= initial(abstract, jax.random.fold_in(jax.random.key(seed), k))
            continue
        found = find_sources(options, [name])
        (frozen if name in FROZEN else params).update(load_child(skeleton, found, name, by_path))
    return skeleton, frozen, params


def initial(abstract: Params, key) -> Params:
    """Fresh weights by path."""
    params: Params = {}
    keys = jax.random.split(key, len(abstract))
    for key, (path, x) in zip(keys, abstract.items(), strict=True):
        if path.endswith("scale"):
            params[path] = jnp.ones(x.shape)
        elif path.endswith("bias") or matches(path, ZERO):
            params[path] = jnp.zeros(x.shape)
        else:
            scale = next(f for rule, f in SCALES if matches(path, [rule]))(x.shape)
            params[path] = scale * jax.random.normal(key, x.shape)
    return params


def stream_of(tokens_BIC) -> ImageStream:
    """Target tokens of square pictures of `EDGE` pixels."""
    rows = EDGE // (2 * 4)
    grid = np.stack(np.meshgrid(np.arange(rows), np.arange(rows), indexing="ij"), -1).reshape(-1, 2)
    grid = np.concatenate([np.zeros((len(grid), 1), int), grid], axis=1).astype(np.int32)
    shape = tokens_BIC.shape[:2]
    return ImageStream(
        tokens_BIC, jnp.full(shape, TARGET), jnp.broadcast_to(jnp.asarray(grid), (*shape, 3))
    )


def condition(model: Model, texts: Texts, how: str) -> Condition:
    """By "t5", by "alignnet", or "both": the first half of the rows by T5, the rest by AlignNet."""
    if how != "both":
        return model.condition(getattr(texts, how))
    half = len(texts.t5.t5_ids_BT) // 2
    first = model.condition(jax.tree.map(lambda x: x[:half], texts.t5))
    rest = model.condition(jax.tree.map(lambda x: x[half:], texts.alignnet))
    return jax.tree.map(lambda *x: jnp.concatenate(x), first, rest)


class Noised(NamedTuple):
    """Pictures on their way to noise: what FLUX is given, and the velocity that it shall find."""

    stream: ImageStream
    target: Any
    sigma: Any
    guidance: Any


def noised(model: Model, moments: Any, logvar: Any, key: Any, mean: float) -> Noised:
    """At logit-normal timesteps of some mean, with random guidance so that it says nothing."""
    latent_key, u_key, noise_key, guidance_key = jax.random.split(key, 4)
    z = model.vae.normalise(model.vae.sample(moments, logvar, latent_key))
    x0 = patchify(z).reshape(len(z), -1, 64)
    noise = jax.random.normal(noise_key, x0.shape)
    sigma = flow.sigma_from_u(flow.sample_u(u_key, (len(z),), "logit_normal", mean=mean))
    guidance = jax.random.uniform(guidance_key, sigma.shape, minval=1.0, maxval=5.0)
    return Noised(stream_of(flow.noised(x0, noise, sigma)), noise - x0, sigma, guidance)


def make_loss(skeleton: Skeleton, how: str, mean: float = 0.0):
    """Flow loss of text to image.

    Args:
      mean: of the logit-normal u; below 0 more noise than signal, where only the text says what
        there is to see.
    """

    def loss(params, frozen, batch: Examples, key):
        model: Model = skeleton.merge(params, frozen)
        x = noised(model, batch.mean, batch.logvar, key, mean)
        txt, pooled = condition(model, batch.texts, how)
        velocity = model.flux(x.stream, txt, pooled, x.sigma, x.guidance).velocity_BIC
        return jnp.square(velocity - x.target).mean()

    return loss


def evaluator(skeleton: Skeleton, frozen: Params, held: Examples):
    """Function: weights -> held-out losses by conditioning and language."""
    losses = {how: jax.jit(make_loss(skeleton, how)) for how in Texts._fields}

    def evaluate(params: Params) -> dict[str, float]:
        found = {}
        for how, loss in losses.items():
            for language, name in enumerate(LANGUAGES):
                rows = held.rows(slice(None), language)
                found[f"{how} {name}"] = float(loss(params, frozen, rows, jax.random.key(0)))
            others = rows._replace(texts=jax.tree.map(lambda x: np.roll(x, 1, 0), rows.texts))
            found[f"{how}, others' captions"] = float(
                loss(params, frozen, others, jax.random.key(0))
            )
        return found

    return evaluate


def train(root: Path, args: argparse.Namespace, seed: int = 0) -> None:
    """Trains, and writes the averaged weights every 500 steps and at the end."""
    skeleton, frozen, params = open_family(root, seed, args.fresh)
    tokenize = Tokenizers(root)

    def prepare(seed: int, count: int) -> Examples:
        return encoded(skeleton, frozen | params, *scenes(seed, count, tokenize)[:2])

    data, held = prepare(seed + 10, args.pictures), prepare(seed + 1, 256)
    # The rate follows the share of the run that is over, by steps or by the clock.
    rate = optax.warmup_cosine_decay_schedule(0, args.rate, 0.05, 1.0, args.rate / 50)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1.0, weight_decay=1e-3))
    loss, evaluate = make_loss(skeleton, "both", NOISY), evaluator(skeleton, frozen, held)

    @jax.jit
    def step(params, ema, opt, frozen, batch, key, share):
        value, grads = jax.value_and_grad(loss)(params, frozen, batch, key)
        scaled: Any
        scaled, opt = tx.update(grads, opt, params)
        updates = {
            p: rate(share) * (1 if p.startswith("flux/") else 2) * u for p, u in scaled.items()
        }
        params = optax.apply_updates(params, updates)
        return params, optax.incremental_update(params, ema, 0.003), opt, value

    def report(k: int, params: Params, begun: float) -> None:
        found = ", ".join(f"{name} {value:.4f}" for name, value in evaluate(params).items())
        minutes = (time.monotonic() - begun) / 60
        print(f"step {k}, {minutes:.1f} min, held-out flow loss: {found}", flush=True)

    opt, ema, rng, begun = tx.init(params), params, np.random.default_rng(seed), time.monotonic()
    report(0, ema, begun)
    bar, mean, k = tqdm(range(args.steps), mininterval=10), 1.0, 0
    for k in bar:
        share = max(k / args.steps, (time.monotonic() - begun) / (60 * args.minutes))
        if share >= 1:
            break
        rows = rng.integers(0, len(data.mean), args.batch)
        mini = data.rows(rows, rng.integers(0, len(LANGUAGES), args.batch))
        key = jax.random.fold_in(jax.random.key(seed), k)
        params, ema, opt, value = step(params, ema, opt, frozen, mini, key, share)
        if k % 20 == 0:
            mean += 0.1 * (float(value) - mean)
            bar.set_postfix(loss=f"{mean:.4f}")
        if k and k % 500 == 0:
            write(ema, root)
            report(k, ema, begun)
    write(ema, root)
    report(k, ema, begun)


def write(params: Params, root: Path) -> None:
    """Saves the trained children in their public layouts, bfloat16."""
    for name in TRAINS:
        getattr(family, f"write_{name}")(child(params, name), root, "bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--family", type=Path, required=True, help="folder with flux/vae, the tokenizers and qwen/"
    )
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop then at the latest")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pictures", type=int, default=12288)
    parser.add_argument("--rate", type=float, default=8e-4)
    parser.add_argument("--fresh", action="store_true", help="begin anew, whatever DIR has")
    parser.add_argument("--measure", action="store_true", help="only print the held-out losses")
    args = parser.parse_args()
    if args.measure:
        skeleton, frozen, params = open_family(args.family)
        drawn = scenes(1, 256, Tokenizers(args.family))
        held = encoded(skeleton, frozen | params, *drawn[:2])
        for name, value in evaluator(skeleton, frozen, held)(params).items():
            print(f"held-out flow loss, {name}: {value:.4f}")
    else:
        train(args.family, args)


if __name__ == "__main__":
    main()
