"""Trains the tiny FLUX with its AlignNet: `python -m x2jax.tiny.base --family DIR [--steps N]`.

Text to image on captioned scenes: rectified flow from scratch, everything in FLUX and AlignNet
trains, the autoencoder and the language model stay as `--family` has them. It never sees a source
image; that is what the adapters learn. The recipe for real bases is a later issue.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from x2jax import flow
from x2jax.children import Precision, configs_of, find_sources, load_child
from x2jax.encoders.tokenize import TextInputs, TextTokenizer
from x2jax.flux import TARGET, ImageStream
from x2jax.flux.latents import patchify
from x2jax.model import Model, make_skeleton
from x2jax.sharding import make_mesh, param_shardings
from x2jax.tiny import captions, family, world
from x2jax.trees import Params, child, matches

TRAINS = (r"flux/.*", r"alignnet/.*")
ZERO = (r"flux/.*/lin/kernel", r"flux/final_layer/.*/kernel")
"""Zero at the start, as in DiT: every block begins as the identity."""
EDGE, TEXT = 64, 64


def open_family(root: Path, seed: int):
    """(skeleton, frozen weights, fresh trainable weights, tokenizer)."""
    family.write_untrained(root, seed)  # the files say what sizes the models have
    names = dict(flux=root / "flux", mllm=root / "qwen", alignnet=root / "alignnet")
    options = {k: str(v) for k, v in names.items()}
    found = find_sources(options, ("flux", "vae", "mllm", "alignnet"))
    skeleton = make_skeleton(configs_of(found), Precision("float32", "float32"))
    by_path = param_shardings(skeleton.abstract, make_mesh({"fsdp": 1}, jax.devices()[:1]))
    frozen: Params = {}
    for name in ("vae", "mllm"):
        frozen |= load_child(skeleton, found, name, by_path)
    params: Params = {}
    shapes = {p: x for p, x in skeleton.abstract.items() if matches(p, TRAINS)}
    for key, (path, x) in zip(
        jax.random.split(jax.random.key(seed), len(shapes)), shapes.items(), strict=True
    ):
        if path.endswith("scale"):
            params[path] = jnp.ones(x.shape)
        elif path.endswith("bias") or matches(path, ZERO):
            params[path] = jnp.zeros(x.shape)
        else:
            fan_in = np.prod(x.shape[-4:-1]) if "conv" in path else x.shape[-2]
            params[path] = jax.random.normal(key, x.shape) / np.sqrt(fan_in)
    # Text features of unit scale, as T5's are near.
    return skeleton, frozen, params, TextTokenizer(root / "qwen", TEXT)


def examples(seed: int, count: int, tokenize: TextTokenizer):
    """Pictures and the token ids of two captions each, English and Chinese."""
    rng = np.random.default_rng(seed)
    scenes = [world.sample_scene(rng) for _ in range(count)]
    pixels = np.stack([world.render(s, (EDGE, EDGE)) for s in scenes])
    texts = [tokenize([captions.caption(s, rng, lang) for s in scenes]) for lang in ("en", "zh")]
    return pixels, np.stack([t[0] for t in texts], 1), np.stack([t[1] for t in texts], 1)


def moments(skeleton, frozen, params, pixels) -> tuple[np.ndarray, np.ndarray]:
    """Posterior moments of all pictures, once."""

    @jax.jit
    def encode(frozen, x):
        model: Model = skeleton.merge(frozen, params)
        return model.vae.encode(x.astype(jnp.float32) / 127.5 - 1)

    parts = [encode(frozen, pixels[k : k + 64]) for k in range(0, len(pixels), 64)]
    mean, logvar = zip(*parts, strict=True)
    return np.concatenate(mean), np.concatenate(logvar)


def make_loss(skeleton):
    """Flow loss of text to image, with random guidance so that its embedder says nothing."""
    rows = EDGE // (2 * 4)
    grid = np.stack(np.meshgrid(np.arange(rows), np.arange(rows), indexing="ij"), -1).reshape(-1, 2)
    positions = np.concatenate([np.zeros((len(grid), 1), int), grid], axis=1)

    def loss(params, frozen, batch, key):
        mean, logvar, ids, mask = batch
        model: Model = skeleton.merge(params, frozen)
        latent_key, u_key, noise_key, guidance_key = jax.random.split(key, 4)
        z = model.vae.normalise(model.vae.sample(mean, logvar, latent_key))
        x0 = patchify(z).reshape(len(z), -1, 64)
        noise = jax.random.normal(noise_key, x0.shape)
        u = flow.sample_u(u_key, (len(z),), "logit_normal")
        sigma = flow.sigma_from_u(u)
        count = x0.shape[1]
        stream = ImageStream(
            flow.noised(x0, noise, sigma),
            jnp.full((len(z), count), TARGET),
            jnp.broadcast_to(positions, (len(z), count, 3)),
        )
        txt, pooled = model.condition(TextInputs(ids, mask))
        guidance = jax.random.uniform(guidance_key, sigma.shape, minval=1.0, maxval=5.0)
        velocity = model.flux(stream, txt, pooled, sigma, guidance).velocity_BIC
        return jnp.square(velocity - (noise - x0)).mean()

    return loss


def train(root: Path, steps: int, batch: int, pictures: int, rate: float, seed: int = 0):
    """Returns the averaged weights by path and the held-out loss."""
    skeleton, frozen, params, tokenize = open_family(root, seed)
    pixels, ids, masks = examples(seed, pictures, tokenize)
    data = (*moments(skeleton, frozen, params, pixels), ids, masks)
    pixels, ids, masks = examples(seed + 1, 256, tokenize)
    held = (*moments(skeleton, frozen, params, pixels), ids[:, 0], masks[:, 0])
    rates = optax.warmup_cosine_decay_schedule(0, rate, min(200, steps // 10), steps, rate / 50)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rates, weight_decay=1e-3))
    loss = make_loss(skeleton)

    @jax.jit
    def step(params, ema, opt, frozen, batch, key):
        value, grads = jax.value_and_grad(loss)(params, frozen, batch, key)
        updates, opt = tx.update(grads, opt, params)
        params = optax.apply_updates(params, updates)
        return params, optax.incremental_update(params, ema, 0.003), opt, value

    opt, ema, rng = tx.init(params), params, np.random.default_rng(seed)
    bar, mean = tqdm(range(steps), mininterval=10), 1.0
    for k in bar:
        rows, which = rng.integers(0, len(data[0]), batch), rng.integers(0, 2, batch)
        mini = (data[0][rows], data[1][rows], data[2][rows, which], data[3][rows, which])
        key = jax.random.fold_in(jax.random.key(seed), k)
        params, ema, opt, value = step(params, ema, opt, frozen, mini, key)
        if k % 20 == 0:
            mean += 0.1 * (float(value) - mean)
            bar.set_postfix(loss=f"{mean:.4f}")
        if k and k % 500 == 0:
            write(ema, root)
    return ema, float(jax.jit(loss)(ema, frozen, held, jax.random.key(0)))


def write(params: Params, root: Path) -> None:
    """Saves the trained children in their public layouts, bfloat16."""
    family.write_flux(child(params, "flux"), root, "bfloat16")
    family.write_alignnet(child(params, "alignnet"), root, "bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--family", type=Path, required=True, help="folder with flux/vae/ and qwen/"
    )
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pictures", type=int, default=16384)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    args = parser.parse_args()
    params, held_out = train(args.family, args.steps, args.batch, args.pictures, args.rate)
    write(params, args.family)
    print(f"held-out flow loss {held_out:.4f}")


if __name__ == "__main__":
    main()
