"""AlignNet by distillation: an MLLM learns to condition FLUX.1 as T5 and CLIP do.

Teacher and student are the same frozen FLUX on the same pure noise; spec x2i.md section 2.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from x2jax import distill, flow, sources
from x2jax.alignnet import RELEASED, AlignNetConfig, Condition
from x2jax.children import (
    MLLMConfig,
    configs_of,
    find_sources,
    options,
    published_configs,
)
from x2jax.data.captions import CaptionBatch, CaptionData
from x2jax.encoders.qwen2_5_vl import QWEN2_5_VL_3B, QWEN2_5_VL_7B
from x2jax.encoders.t5_clip import CLIP_LENGTH, T5ClipInputs, T5ClipTokenizer
from x2jax.encoders.tokenize import TextInputs, TextTokenizer
from x2jax.flux import TARGET, ImageStream
from x2jax.flux.latents import unpatchify
from x2jax.model import Model
from x2jax.recipes.base import Recipe
from x2jax.step import Metrics
from x2jax.trees import Params

MLLMS = {"qwen2.5-vl-7b": QWEN2_5_VL_7B, "qwen2.5-vl-3b": QWEN2_5_VL_3B}
"""MLLMs of released AlignNets that are here, for planning without files."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is compared, and how (spec x2i.md section 2).

    Attributes:
      size: edge of the square picture in pixels; 1024 gives 4096 tokens.
      guidance: guidance scale, for bases that have a guidance embedder.
      temperature: of the feature distributions.
      direction: one of `distill.DIRECTIONS`.
      text_weight: what a text token counts in the loss, an image token counting 1.
      segment: blocks between two kept states of both; 0 keeps the teacher's tensors
        (`x2jax.flux.scan.scan_blocks`).
    """

    size: int
    guidance: float
    temperature: float
    direction: str
    text_weight: float
    segment: int


class Distil(Recipe):
    """Trains AlignNet so that its output moves FLUX's attention as T5's and CLIP's does.

    Attributes:
      objective: what is minimised.
    """

    children = ("flux", "vae", "t5", "clip", "mllm")

    def __init__(self, config: Any, configs: Any, found: Any):
        self.objective = Objective(**config.objective)
        super().__init__(config, configs, found)
        cell = 2 * self.configs["vae"].factor
        if self.objective.size % cell:
            raise ValueError(
                f"--config.objective.size={self.objective.size} is no multiple of {cell} px, one "
                "packed token"
            )
        self.rows = self.objective.size // cell

    @classmethod
    def require(cls, config: Any) -> None:
        captions = (
            "a glob of captions: .txt (one a line), .jsonl, .tar or .parquet (with "
            "--config.captions.key); 100,000 English sentences suffice, as in `hf download "
            "google-research-datasets/conceptual_captions --repo-type dataset --local-dir DIR`"
        )
        sources.require(config, (*options(cls.children), "data"), {"data": captions})

    @classmethod
    def outline(cls, config: Any) -> "Distil":
        if any(config[option] for option in options(cls.children)):
            found = find_sources(config, cls.children)
            return cls(config, configs_of(found), {})
        configs = published_configs(cls.children)
        if config.released in MLLMS:
            configs["mllm"] = MLLMConfig(MLLMS[config.released])
        return cls(config, configs, {})

    def fresh(self, configs: Mapping[str, Any]) -> dict[str, Any]:
        """An AlignNet for this MLLM and this FLUX.

        Raises:
          ValueError: an unknown release, or one whose MLLM has other states than this one.
        """
        flux, mllm, name = configs["flux"], configs["mllm"].text, self.config.released
        wide = dict(text_width=flux.text_width, pooled_width=flux.pooled_width)
        if not name:
            return {"alignnet": AlignNetConfig(mllm.states, mllm.width, **wide)}
        if name not in RELEASED:
            raise ValueError(f"--config.released={name!r}: use one of {', '.join(RELEASED)}, or ''")
        cfg = dataclasses.replace(RELEASED[name], **wide)
        if (cfg.states, cfg.width) != (mllm.states, mllm.width):
            raise ValueError(
                f"--config.released={name} is an AlignNet of {cfg.states} states of width "
                f"{cfg.width}, this MLLM gives {mllm.states} of width {mllm.width}: name the one "
                f"for this MLLM, of {', '.join(RELEASED)}"
            )
        return {"alignnet": cfg}

    def open_data(self, workdir: Path) -> CaptionData:
        config, text = self.config, self.config.text
        # The tokenizers lie beside the weights of FLUX.
        root = self.found["flux"].path.parent
        return CaptionData(
            config.data,
            workdir,
            teacher=T5ClipTokenizer(root, text.length),
            student=TextTokenizer(self.found["mllm"].path, text.length, text.template),
            seed=config.seed,
            batch_size=config.batch_size,
            held_out=config.held_out,
            **config.captions,
        )

    def batch(self) -> CaptionBatch:
        count, length = self.config.batch_size, self.config.text.length

        def array(dtype: str, *shape: int) -> Any:
            return jax.ShapeDtypeStruct((count, *shape), dtype)

        return CaptionBatch(
            teacher=T5ClipInputs(array("int32", length), array("int32", CLIP_LENGTH)),
            student=TextInputs(array("int32", length), array("bool", length)),
            sample_id=array("int32"),
        )

    def loss(
        self, params: Params, frozen: Params, batch: CaptionBatch, key: PRNGKeyArray
    ) -> tuple[Array, Metrics]:
        """The distillation loss of one batch at t = 1, and its parts by kind of block.

        `count_dropped` counts terms that are not finite.
        """
        found = self.distillation(params, frozen, batch, key)
        parts = found._asdict()
        loss, dropped = parts.pop("loss"), parts.pop("dropped")
        return loss, {**parts, "count_dropped": dropped}

    def distillation(
        self, params: Params, frozen: Params, batch: CaptionBatch, key: PRNGKeyArray
    ) -> distill.Distillation:
        """Teacher and student on the same noise."""
        model: Model = self.skeleton.merge(params, frozen)
        img = self.stream(self._noise(model, batch, key))
        how = self.objective
        seen = model.flux.lockstep(
            img,
            model.condition(batch.teacher),
            model.condition(batch.student),
            jnp.ones(len(batch.sample_id)),
            self._guidance(model, batch, how.guidance),
            probe=distill.DistillProbe(
                img.roles_BI == TARGET, how.temperature, how.direction, how.text_weight
            ),
            remat=self.config.remat,
            segment=how.segment,
        )
        return distill.distillation(seen)

    def held_out(self, params: Params, frozen: Params, batch: CaptionBatch) -> Metrics:
        """The loss on captions that are never trained on, at fixed noise."""
        found = self.distillation(params, frozen, batch, jax.random.key(0))
        return {"held_out_loss": found.loss}

    def preview(self, params: Params, frozen: Params, batch: CaptionBatch) -> dict[str, Array]:
        """Pictures of the held-out captions under either conditioning, from the same noise."""
        return dict(
            zip(("teacher", "student"), jax.jit(self._pair)(params, frozen, batch), strict=True)
        )

    def _pair(self, params: Params, frozen: Params, batch: CaptionBatch) -> tuple[Array, Array]:
        model: Model = self.skeleton.merge(params, frozen)
        how = self.config.preview
        teacher = self.picture(model, model.condition(batch.teacher), batch, **how)
        return teacher, self.picture(model, model.condition(batch.student), batch, **how)

    def picture(
        self,
        model: Model,
        text: Condition,
        batch: CaptionBatch,
        *,
        steps: int,
        guidance: float,
        shift: bool = True,
    ) -> Float[Array, "B H W 3"]:
        """Text to image from fixed noise; pixels about [-1, 1].

        Args:
          steps: Euler steps (28 on dev, 4 on schnell).
          guidance: 3.5 in the releases.
          shift: the resolution shift of sigmas; off for schnell.
        """
        noise = self._noise(model, batch, jax.random.key(0))
        scale = self._guidance(model, batch, guidance)

        def velocity(x, sigma_B):
            return model.flux(self.stream(x), *text, sigma_B, scale).velocity_BIC

        mu = jnp.full(len(noise), flow.shift_mu(self.rows**2) if shift else 0.0)
        x = flow.euler(velocity, noise, flow.sample_sigmas(steps, mu))
        patches = x.reshape(len(x), self.rows, self.rows, -1)
        return model.vae.decode(model.vae.denormalise(unpatchify(patches)))

    def _noise(self, model: Model, batch: CaptionBatch, key: PRNGKeyArray) -> Array:
        shape = (len(batch.sample_id), self.rows**2, model.flux.cfg.channels)
        return jax.random.normal(key, shape)

    def _guidance(self, model: Model, batch: CaptionBatch, scale: float) -> Array | None:
        return jnp.full(len(batch.sample_id), scale) if model.flux.cfg.guidance else None

    def stream(self, tokens_BIC: Float[Array, "B I C"]) -> ImageStream:
        """Target tokens of the whole square."""
        row, column = np.divmod(np.arange(self.rows**2), self.rows)
        positions = np.stack([np.zeros_like(row), row, column], axis=-1).astype(np.int32)
        shape = tokens_BIC.shape[:2]
        return ImageStream(
            tokens_BIC,
            jnp.full(shape, TARGET),
            jnp.broadcast_to(positions, (*shape, 3)),
        )
