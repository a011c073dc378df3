"""Draws captions of unseen scenes with the tiny FLUX: `python -m x2jax.tiny.draw --out FILE`.

Columns: the scene that the caption tells of, then what T5 + CLIP and AlignNet make of it, in
English and in Chinese.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from PIL import Image

from x2jax import flow, samples
from x2jax.alignnet import Condition
from x2jax.flux.latents import unpatchify
from x2jax.model import Model
from x2jax.sources import TINY
from x2jax.tiny import base, captioned


def pictures(
    model: Model,
    condition: Condition,
    noise_BIC: Float[Array, "B I C"],
    *,
    steps: int,
    guidance: float,
) -> Float[Array, "B H W 3"]:
    """Square pictures of `captioned.EDGE` pixels in [-1, 1], as diffusers' pipeline draws them."""
    count, tokens, _ = noise_BIC.shape

    def velocity(x, sigma_B):
        scale = jnp.full(count, guidance)
        return model.flux(base.stream_of(x), *condition, sigma_B, scale).velocity_BIC

    sigmas = flow.sample_sigmas(steps, flow.shift_mu(jnp.full(count, tokens)))
    x = flow.euler(velocity, noise_BIC, sigmas)
    edge = captioned.EDGE // 8
    return model.vae.decode(model.vae.denormalise(unpatchify(x.reshape(count, edge, edge, -1))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", type=Path, default=TINY, help="default: the shipped one")
    parser.add_argument("--out", type=Path, required=True, help="a PNG")
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=77)
    args = parser.parse_args()
    skeleton, frozen, params = base.open_family(args.family)
    pixels, texts, words = captioned.scenes(
        args.seed, args.count, captioned.Tokenizers(args.family)
    )
    edge = captioned.EDGE // 8
    noise = jax.random.normal(jax.random.key(args.seed), (args.count, edge * edge, 64))

    def draw(weights, text):
        model: Model = skeleton.merge(weights)
        options = dict(steps=args.steps, guidance=args.guidance)
        return pictures(model, model.condition(text), noise, **options)

    columns, titles = [pixels], ["scene"]
    for how, name in (("t5", "T5 + CLIP"), ("alignnet", "AlignNet")):
        for k, language in enumerate(("English", "Chinese")):
            text = jax.tree.map(lambda x, k=k: x[:, k], getattr(texts, how))
            columns.append(samples.to_uint8(jax.jit(draw)(params | frozen, text)))
            titles.append(f"{name}, {language}")
    rows = [(words[0][k], [c[k] for c in columns]) for k in range(args.count)]
    Image.fromarray(samples.draw(rows, tuple(titles))).save(args.out)


if __name__ == "__main__":
    main()
