"""Trains the tiny autoencoder: `python -m x2jax.tiny.vae --family DIR [--steps N]`.

Reconstruction (L1) with a small KL term, then the latent statistics become shift and scale, so that
latents have mean 0 and standard deviation 1 as FLUX expects.
"""

import argparse
import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from x2jax.encoders.vae import TINY_VAE, VAE
from x2jax.tiny import family, world
from x2jax.trees import Skeleton, state_params


def pictures(seed: int, count: int, size: int = 64) -> np.ndarray:
    """Rendered scenes, uint8 (count, size, size, 3)."""
    rng = np.random.default_rng(seed)
    return np.stack([world.render(world.sample_scene(rng), (size, size)) for _ in range(count)])


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1], mean over pictures."""
    error = np.square(np.clip(a, -1, 1) - b).mean(axis=(1, 2, 3))
    return float(np.mean(10 * np.log10(4 / error)))


def train(steps: int, batch: int, images: int, seed: int = 0):
    """Returns (skeleton, params, latent mean, latent std, PSNR on unseen pictures)."""
    vae = VAE(TINY_VAE, rngs=nnx.Rngs(seed))
    skeleton, params = Skeleton(vae), state_params(vae)
    data = pictures(seed, images)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.warmup_cosine_decay_schedule(0, 2e-3, min(100, steps // 10), steps)),
    )

    def loss(params, pixels, key):
        model = skeleton.merge(params)
        x = pixels.astype(jnp.float32) / 127.5 - 1
        mean, logvar = model.encode(x)
        y = model.decode(model.sample(mean, logvar, key))
        kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).mean()
        return jnp.abs(y - x).mean() + 0.5 * jnp.square(y - x).mean() + 2e-4 * kl

    @jax.jit
    def step(params, opt, pixels, key):
        value, grads = jax.value_and_grad(loss)(params, pixels, key)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, value

    opt, rng = tx.init(params), np.random.default_rng(seed)
    bar = tqdm(range(steps), mininterval=5)
    for k in bar:
        # Mostly on quarters, at a quarter of the cost; whole pictures last, for the attention.
        edge = 32 if k < 0.85 * steps else 64
        y, x = rng.integers(0, 64 - edge + 1, 2)
        pixels = data[rng.integers(0, len(data), batch), y : y + edge, x : x + edge]
        params, opt, value = step(params, opt, pixels, jax.random.fold_in(jax.random.key(seed), k))
        if k % 50 == 0:
            bar.set_postfix(loss=f"{float(value):.4f}")

    @jax.jit
    def reconstruct(params, pixels):
        model = skeleton.merge(params)
        x = pixels.astype(jnp.float32) / 127.5 - 1
        mean, _ = model.encode(x)
        return x, mean, model.decode(mean)

    x, mean, y = (np.asarray(a) for a in reconstruct(params, pictures(seed + 1, 128)))
    return skeleton, params, float(mean.mean()), float(mean.std()), psnr(y, x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", type=Path, required=True, help="folder of flux/vae")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--images", type=int, default=8192)
    args = parser.parse_args()
    _, params, mean, std, quality = train(args.steps, args.batch, args.images)
    if not math.isfinite(quality):
        raise FloatingPointError("training diverged")
    cfg = dataclasses.replace(
        TINY_VAE, shift_factor=round(mean, 4), scaling_factor=round(1 / std, 4)
    )
    family.write_vae(params, cfg, args.family, "bfloat16")
    print(f"latents mean {mean:.4f}, std {std:.4f}; PSNR on unseen pictures {quality:.2f} dB")


if __name__ == "__main__":
    main()
