"""Full training of a FLUX.1: one of any size from scratch, or a given one further."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from x2jax.children import check_fit
from x2jax.flux import FluxConfig
from x2jax.recipes.flow_matching import AnyText
from x2jax.trees import Params, matches

ZERO = (r"flux/.*/lin/kernel", r"flux/final_layer/.*/kernel")
"""Zero at the start, as in DiT: every block begins as the identity."""


class Pretrain(AnyText):
    """Flow matching of every weight that `trainable` names, from text to image or on edits."""

    @classmethod
    def parts(cls, config: Any) -> tuple[str, ...]:
        names = super().parts(config)
        return tuple(n for n in names if n != "flux") if config.scratch else names

    def fresh(self, configs: Mapping[str, Any]) -> dict[str, Any]:
        """The FLUX of `config.model` where it starts from scratch.

        Raises:
          ValueError: sizes that contradict each other, or do not fit the text encoders.
        """
        if not self.config.scratch:
            return {}
        sizes = dict(self.config.model)
        flux = FluxConfig(**sizes | {"axes": tuple(sizes["axes"])})
        channels = 4 * configs["vae"].latent_channels
        if flux.channels != channels:
            raise ValueError(
                f"--config.model.channels={flux.channels}: this VAE makes tokens of {channels}"
            )
        where = dict.fromkeys(configs, "the published sizes") | self.source_paths
        check_fit({**configs, "flux": flux}, where)
        return {"flux": flux}

    def initial(self, seed: int, by_path: Mapping[str, Any]) -> Params:
        params = super().initial(seed, by_path)
        if not self.config.scratch:
            return params
        return {p: jnp.zeros_like(x) if matches(p, ZERO) else x for p, x in params.items()}

    def guidance(self, count: int, train_key: Any) -> Any:
        """Drawn evenly in training, so that the embedder learns to say nothing."""
        low, high = self.config.guidance
        if train_key is None:
            return (low + high) / 2
        return jax.random.uniform(train_key, (count,), minval=low, maxval=high)
