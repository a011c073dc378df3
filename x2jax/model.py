"""The model of a run: the children that its recipe names, between a batch and a velocity."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from x2jax.alignnet import Condition
from x2jax.children import CHILDREN, Configs, Precision
from x2jax.data.batch import Batch
from x2jax.encoders.t5_clip import T5ClipInputs
from x2jax.encoders.tokenize import TextInputs
from x2jax.flux.latents import ImageStream, pack, patchify, unpack_target, unpatchify
from x2jax.trees import Skeleton


class Model(nnx.Module):
    """Children by name (`x2jax.children.CHILDREN`); None for those that a recipe does without."""

    def __init__(self, configs: Configs, precision: Precision, rngs: nnx.Rngs):
        def build(name: str) -> Any:
            return CHILDREN[name].build(configs, precision, rngs) if name in configs else None

        self.flux = build("flux")
        self.vae = build("vae")
        self.mllm = build("mllm")
        self.alignnet = build("alignnet")
        self.t5 = build("t5")
        self.clip = build("clip")
        self.adapter = build("adapter")

    def condition(self, text: Any) -> Condition:
        """Text features and pooled vector; the type of `text` says by which encoders.

        Args:
          text: `TextInputs` for the MLLM and AlignNet (no gradient enters the MLLM),
            `T5ClipInputs` for T5 and CLIP, or a `Condition` that was computed before.

        Raises:
          TypeError: a type without encoders.
        """
        if isinstance(text, Condition):
            return text
        if isinstance(text, TextInputs):
            states = self.mllm.hidden_states(text.ids_BT, text.mask_BT)
            return self.alignnet(jax.lax.stop_gradient(states))
        if isinstance(text, T5ClipInputs):
            return Condition(self.t5(text.t5_ids_BT), self.clip(text.clip_ids_BS).pooled_BD)
        raise TypeError(f"nothing here conditions on {type(text).__name__}")

    def encode(
        self, batch: Batch, key: PRNGKeyArray, budget: int, source_offset: int
    ) -> ImageStream:
        """The packed clean stream: posterior samples of target and sources, normalised."""

        def slot(item):
            pixels, sizes, key = item
            x = pixels.astype(jnp.float32) / 127.5 - 1
            mean, logvar = self.vae.encode(x, sizes)
            return patchify(self.vae.normalise(self.vae.sample(mean, logvar, key)))

        slots = batch.pixels.shape[1]
        # One slot after another: at 1024 px the VAE's activations are the largest of the step.
        patches = jax.lax.map(
            slot,
            (
                jnp.moveaxis(batch.pixels, 1, 0),
                jnp.moveaxis(batch.sizes, 1, 0),
                jax.random.split(key, slots),
            ),
        )
        grids = batch.sizes // (2 * self.vae.cfg.factor)
        stream = pack(jnp.moveaxis(patches, 0, 1), grids, budget, source_offset)
        return jax.tree.map(jax.lax.stop_gradient, stream)

    def decode(self, stream: ImageStream, batch: Batch) -> Float[Array, "B Hc Wc 3"]:
        """Target tokens to pixels in [-1, 1] on the canvas."""
        factor = self.vae.cfg.factor
        height, width = (n // (2 * factor) for n in batch.pixels.shape[2:4])
        grids = batch.sizes[:, 0] // (2 * factor)
        latents = unpatchify(unpack_target(stream.tokens_BIC, grids, height, width))
        return self.vae.decode(self.vae.denormalise(latents), batch.sizes[:, 0])


def make_skeleton(configs: Configs, precision: Precision) -> Skeleton:
    """The `Model` of some architectures by child, without allocating anything."""
    return Skeleton(nnx.eval_shape(lambda: Model(configs, precision, nnx.Rngs(0))))
