"""The model of a run: the children that its recipe names, between a batch and a velocity."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from x2jax.alignnet import Condition
from x2jax.children import CHILDREN, Configs, Precision
from x2jax.conditioning import MessageInputs
from x2jax.data.batch import Batch, Moments
from x2jax.encoders.t5_clip import T5ClipInputs
from x2jax.encoders.tokenize import TextInputs
from x2jax.encoders.vae import sample
from x2jax.flux.latents import ImageStream, pack, patchify, unpack_target, unpatchify
from x2jax.trees import Skeleton


class Model(nnx.Module):
    """Children by name (`x2jax.children.CHILDREN`); None for those that a recipe does without."""

    def __init__(
        self, configs: Configs, precision: Precision, rngs: nnx.Rngs, without: Iterable[str] = ()
    ):
        there = set(configs) - set(without)

        def build(name: str) -> Any:
            return CHILDREN[name].build(configs, precision, rngs) if name in there else None

        # Latents that were computed before need the VAE's sizes and scale, but not the VAE.
        self.vae_cfg: Any = configs.get("vae")
        self.flux = build("flux")
        self.vae = build("vae")
        self.mllm = build("mllm")
        self.alignnet = build("alignnet")
        self.t5 = build("t5")
        self.clip = build("clip")
        self.adapter = build("adapter")
        self.control = build("control")

    def condition(self, text: Any) -> Condition:
        """Text features and pooled vector; the type of `text` says by which encoders.

        Args:
          text: `TextInputs`, or `MessageInputs` with images and videos, for the MLLM and AlignNet
            (no gradient enters the MLLM); `T5ClipInputs` for T5 and CLIP; or a `Condition` that was
            computed before.

        Raises:
          TypeError: a type without encoders.
        """
        if isinstance(text, Condition):
            return text
        if isinstance(text, TextInputs):
            return self.alignnet.condition(self.mllm, text.ids_BT, text.mask_BT)
        if isinstance(text, MessageInputs):
            return self.alignnet.condition(
                self.mllm,
                text.ids_BT,
                text.mask_BT,
                positions_BT3=text.positions_BT3,
                vision=text.vision,
                select_Bt=text.select_Bt,
            )
        if isinstance(text, T5ClipInputs):
            return Condition(self.t5(text.t5_ids_BT), self.clip(text.clip_ids_BS).pooled_BD)
        raise TypeError(f"nothing here conditions on {type(text).__name__}")

    def encode(
        self, batch: Batch, key: PRNGKeyArray, budget: int, source_offset: int
    ) -> ImageStream:
        """The packed clean stream: posterior samples of target and sources, normalised."""
        mean, logvar = self.moments(batch) if batch.moments is None else batch.moments
        keys = jax.random.split(key, mean.shape[1])
        draw = jax.vmap(sample, in_axes=(1, 1, 0), out_axes=1)
        latents = draw(mean.astype(jnp.float32), logvar.astype(jnp.float32), keys)
        patches = patchify(self.vae_cfg.normalise(latents))
        grids = batch.sizes // (2 * self.vae_cfg.factor)
        stream = pack(patches, grids, budget, source_offset)
        return jax.tree.map(jax.lax.stop_gradient, stream)

    def moments(self, batch: Batch) -> Moments:
        """The VAE's posteriors of the pixels of a batch, float32."""

        def slot(item):
            pixels, sizes = item
            return self.vae.encode(pixels.astype(jnp.float32) / 127.5 - 1, sizes)

        # One slot after another: at 1024 px the VAE's activations are the largest of the step.
        items = jnp.moveaxis(batch.pixels, 1, 0), jnp.moveaxis(batch.sizes, 1, 0)
        return Moments(*(jnp.moveaxis(x, 0, 1) for x in jax.lax.map(slot, items)))

    def decode(self, stream: ImageStream, batch: Batch) -> Float[Array, "B Hc Wc 3"]:
        """Target tokens to pixels in [-1, 1] on the canvas.

        Raises:
          ValueError: a batch of moments, which has no canvas of pixels.
        """
        if batch.pixels is None:
            raise ValueError("this batch holds moments: pixels are decoded where pixels came in")
        factor = self.vae.cfg.factor
        height, width = (n // (2 * factor) for n in batch.pixels.shape[2:4])
        grids = batch.sizes[:, 0] // (2 * factor)
        latents = unpatchify(unpack_target(stream.tokens_BIC, grids, height, width))
        return self.vae.decode(self.vae.denormalise(latents), batch.sizes[:, 0])


def make_skeleton(configs: Configs, precision: Precision, without: Iterable[str] = ()) -> Skeleton:
    """The `Model` of some architectures by child, without allocating anything.

    Args:
      without: children that are left out: what they would compute comes with the batches.
    """
    return Skeleton(nnx.eval_shape(lambda: Model(configs, precision, nnx.Rngs(0), without)))
