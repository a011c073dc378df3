"""Flow matching on the packed image stream: what x2edit, LoRA, LightControl and others share."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from x2jax import flow, losses
from x2jax.alignnet import Condition
from x2jax.conditioning import message_shapes
from x2jax.data import transforms
from x2jax.data.batch import Batch, Moments
from x2jax.data.edits import BUCKETS, EditData
from x2jax.edit_text import PictureTokenizer
from x2jax.encoders.t5_clip import CLIP_LENGTH, T5ClipInputs, T5ClipTokenizer
from x2jax.encoders.tokenize import TextInputs, TextTokenizer
from x2jax.flux import TARGET
from x2jax.model import Model
from x2jax.recipes import precomputed
from x2jax.recipes.base import Recipe
from x2jax.step import Metrics
from x2jax.trees import Params


@dataclasses.dataclass(frozen=True)
class Objective:
    """Flow matching and the contrastive loss (spec x2edit.md section 4).

    Attributes:
      density: scheme that draws timesteps, one of `flow.DENSITIES`.
      guidance: guidance scale in training, for bases that have a guidance embedder.
      contrastive: weight of the contrastive loss; 0 leaves it out of the program.
      temperature: of the contrastive loss.
      stop_gradient: no gradient through the gathered side of a pair, as the reference.
      source_offset: rows added to the position ids of source j, j times.
      tokens: budget of image-stream tokens a sample: target and sources together.
    """

    density: str
    guidance: float
    contrastive: float
    temperature: float
    stop_gradient: bool
    source_offset: int
    tokens: int


class FlowMatching(Recipe):
    """Learns the velocity from noise to target tokens, given source tokens and an instruction.

    Attributes:
      conditioners: children that make the text features.
      precomputes: whether training can read moments instead of pixels, and text features instead of
        texts; the config of such a recipe has a key `features`.
      objective: what is minimised.
    """

    conditioners: ClassVar[tuple[str, ...]] = ("mllm", "alignnet")
    precomputes: ClassVar[bool] = False

    def __init__(self, config: Any, configs: Any, found: Any, without: tuple[str, ...] = ()):
        super().__init__(config, configs, found, without)
        self._features: Path | None = None
        self.objective = Objective(**config.objective)
        self._edit = jax.jit(self.edit, static_argnames=("steps", "shift"))

    def with_precomputed(self, workdir: Path) -> "FlowMatching":
        """Without the children whose outputs are in `precomputed.folder`, if anything is there."""
        where = precomputed.folder(self.config, workdir) if self.precomputes else None
        if where is None:
            return self
        without = precomputed.children(self, precomputed.parts_at(self, where))
        recipe = self._less(without)
        recipe._features = where
        recipe.notes.append(
            f"reading {where}: {', '.join(without)} are neither loaded nor run; no sample grids "
            f"(--config.features={precomputed.NONE} computes everything in the step)"
        )
        return recipe

    def from_features(self) -> Recipe:
        if not self.precomputes:
            return super().from_features()
        return self._less(precomputed.children(self, precomputed.parts_of(self)))

    def _less(self, without: tuple[str, ...]) -> "FlowMatching":
        return type(self)(self.config, self.configs, self.found, without)

    @property
    def shows(self) -> bool:
        return "vae" not in self.without

    def fingerprints(self, frozen: Params) -> dict[str, str]:
        """Also of the children that were run before: their features say which they were."""
        before = {}
        if self.data.features is not None:
            before = {name: self.data.features.meta["weights"][name] for name in self.without}
        return super().fingerprints(frozen) | before

    def open_data(self, workdir: Path) -> EditData:
        config = self.config
        features = {}
        if self._features is not None:
            parts = precomputed.parts_at(self, self._features)
            features = {"features": self._features, "made_of": precomputed.made_of(self, parts)}
        data = EditData(
            config.data,
            workdir,
            self.tokenizer(),
            seed=config.seed,
            batch_size=config.batch_size,
            held_out=config.held_out,
            language=config.text.language,
            workers=config.workers,
            **config.image,
            **config.sampler,
            **features,
        )
        cell, slots = 2 * self.configs["vae"].factor, self.stream_slots()
        data.check(cell=cell, tokens=self.objective.tokens, slots=slots)
        return data

    def stream_slots(self) -> int:
        """Images of a sample that become tokens."""
        return self.config.image.slots

    @classmethod
    def sees(cls, config: Any) -> bool:
        """As `config.text.pictures` says.

        Raises:
          ValueError: samples without sources.
        """
        pictures = config.text.get("pictures", False)  # runs of before may lack it
        if pictures and config.image.slots < 2:
            raise ValueError(
                "--config.text.pictures shows the MLLM a sample's sources, and with "
                f"image.slots={config.image.slots} there are none"
            )
        return pictures

    def tokenizer(self) -> Any:
        """Instructions to what `Model.condition` takes; `x2jax.edit_text.read` calls it."""
        text = self.config.text
        if self.sees(self.config):
            return PictureTokenizer(
                self.found["mllm"].path,
                self.configs["mllm"].vision,
                length=text.length,
                template=text.template,
                sources=self.config.image.slots - 1,
                edge=text.edge,
            )
        return TextTokenizer(self.found["mllm"].path, text.length, text.template)

    def text_shapes(self, batch: int) -> Any:
        """Shapes of what `tokenizer` makes of `batch` instructions."""
        if self.sees(self.config):
            return message_shapes(
                batch,
                length=self.config.text.length,
                images=self.config.image.slots - 1,
                edge=self.config.text.edge,
                vision=self.configs["mllm"].vision,
            )
        shape = (batch, self.config.text.length)
        return TextInputs(jax.ShapeDtypeStruct(shape, "int32"), jax.ShapeDtypeStruct(shape, "bool"))

    def batch(self) -> Batch:
        count, image = self.config.batch_size, self.config.image
        height, width = transforms.canvas_size(BUCKETS[image.buckets])

        def array(dtype: str, *shape: int) -> Any:
            return jax.ShapeDtypeStruct((count, *shape), dtype)

        pixels = array("uint8", image.slots, height, width, 3)
        moments, text = None, self.text_shapes(count)
        computed = self.config.precision.compute
        if "vae" in self.without:
            vae = self.configs["vae"]
            latents = (image.slots, height // vae.factor, width // vae.factor, vae.latent_channels)
            pixels, moments = None, Moments(*[array(computed, *latents)] * 2)
        if set(self.conditioners) <= set(self.without):
            flux = self.configs["flux"]
            txt = array(computed, self.config.text.length, flux.text_width)
            text = Condition(txt, array(computed, flux.pooled_width))
        return Batch(
            pixels=pixels,
            sizes=array("int32", image.slots, 2),
            text=text,
            task=array("int32"),
            sample_id=array("int32"),
            moments=moments,
        )

    def loss(
        self, params: Params, frozen: Params, batch: Batch, key: PRNGKeyArray
    ) -> tuple[Array, Metrics]:
        """Flow loss + weight x contrastive loss of one batch, and both apart.

        `count_lonely` counts anchors without a positive in the batch.
        """
        u_key, latent_key, noise_key = jax.random.split(key, 3)
        u = flow.sample_u(u_key, batch.task.shape, self.objective.density)
        flow_B, gram = self.flow_loss(
            params, frozen, batch, flow.sigma_from_u(u), latent_key, noise_key,
            train_key=jax.random.fold_in(key, 3),
        )  # fmt: skip
        total = flow_B.mean()
        metrics = {"flow": total}
        if self.objective.contrastive:
            contrastive = losses.contrastive_loss(
                gram,
                batch.task,
                temperature=self.objective.temperature,
                stop_gradient=self.objective.stop_gradient,
            )
            total += self.objective.contrastive * contrastive.loss
            metrics |= {"contrastive": contrastive.loss, "count_lonely": contrastive.lonely}
        return total, metrics

    def flow_loss(
        self,
        params: Params,
        frozen: Params,
        batch: Batch,
        sigma_B: Float[Array, "B"],
        latent_key: PRNGKeyArray,
        noise_key: PRNGKeyArray,
        train_key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "B"], Any]:
        """Flow loss of every sample at given sigmas; Gram matrices by block (None if off).

        `train_key` is for what is random in training alone; None outside it.
        """
        model: Model = self.skeleton.merge(params, frozen)
        if train_key is not None and model.adapter is not None:
            model.adapter.drop(train_key)
        guidance = self.guidance(sigma_B.shape[0], train_key)
        clean = self._encode(model, batch, latent_key)
        is_target = clean.roles_BI == TARGET
        noise = jax.random.normal(noise_key, clean.tokens_BIC.shape)
        x_t = flow.noised(clean.tokens_BIC, noise, sigma_B)
        stream = clean._replace(tokens_BIC=jnp.where(is_target[..., None], x_t, clean.tokens_BIC))
        probe = None
        if self.objective.contrastive:
            probe = losses.GramProbe(is_target, stop_gradient=self.objective.stop_gradient)
        out = self._velocity(model, stream, sigma_B, batch, guidance, probe)
        weight = flow.weight(sigma_B, self.objective.density)
        target = noise - clean.tokens_BIC
        return losses.flow_loss(out.velocity_BIC, target, is_target, weight), out.seen.double

    def guidance(self, count: int, train_key: PRNGKeyArray | None) -> Any:
        """Guidance scale of `count` samples: a number, or one a sample."""
        return self.objective.guidance

    def control(self, model: Model, batch: Batch) -> Any:
        """What FLUX takes as `control`; None for recipes without."""
        return None

    def held_out(self, params: Params, frozen: Params, batch: Batch) -> Metrics:
        """Flow loss at fixed noise and evenly spread sigmas: comparable between steps and runs."""
        count = batch.task.shape[0]
        sigma = (jnp.arange(count) + 0.5) / count
        keys = jax.random.split(jax.random.key(0))
        flow_B, _ = self.flow_loss(params, frozen, batch, sigma, keys[0], keys[1])
        return {"held_out_flow": flow_B.mean()}

    def edit(
        self,
        params: Params,
        frozen: Params,
        batch: Batch,
        key: PRNGKeyArray,
        *,
        steps: int,
        guidance: float,
        shift: bool = True,
    ) -> Float[Array, "B Hc Wc 3"]:
        """Edits the sources of a batch; its target pixels are not looked at, only their sizes.

        Args:
          steps: Euler steps (28 on dev, 4 on schnell).
          guidance: 3.5 in the releases.
          shift: the resolution shift of sigmas; off for schnell.
        """
        model: Model = self.skeleton.merge(params, frozen)
        latent_key, noise_key = jax.random.split(key)
        clean = self._encode(model, batch, latent_key)
        is_target = (clean.roles_BI == TARGET)[..., None]
        text = model.condition(batch.text)

        def velocity(x, sigma_B):
            stream = clean._replace(tokens_BIC=jnp.where(is_target, x, clean.tokens_BIC))
            return self._velocity(model, stream, sigma_B, batch, guidance, None, text).velocity_BIC

        count_B = is_target.sum(axis=(1, 2))
        mu = flow.shift_mu(count_B) if shift else jnp.zeros(count_B.shape)
        noise = jax.random.normal(noise_key, clean.tokens_BIC.shape)
        x = flow.euler(velocity, noise, flow.sample_sigmas(steps, mu))
        return model.decode(clean._replace(tokens_BIC=x), batch)

    def _velocity(self, model, stream, sigma_B, batch, guidance, probe, text=None):
        txt, pooled = model.condition(batch.text) if text is None else text
        scale = jnp.broadcast_to(guidance, sigma_B.shape) if model.flux.cfg.guidance else None
        return model.flux(
            stream,
            txt,
            pooled,
            sigma_B,
            scale,
            adapters=model.adapter,
            control=self.control(model, batch),
            task_BD=None if model.adapter is None else model.adapter.task(batch.task),
            probe=probe,
            remat=self.config.remat,
        )

    def _encode(self, model, batch, key):
        return model.encode(batch, key, self.objective.tokens, self.objective.source_offset)

    def preview(self, params: Params, frozen: Params, batch: Batch) -> dict[str, Array]:
        """Edits from fixed noise."""
        key = jax.random.key(0)
        return {"prediction": self._edit(params, frozen, batch, key, **self.config.preview)}


ENCODERS = {"mllm": ("mllm", "alignnet"), "t5+clip": ("t5", "clip")}
"""What reads the text, by the children that it takes."""


class AnyText(FlowMatching):
    """Flow matching on texts that `config.text.encoders`, one of `ENCODERS`, reads."""

    children = ("flux", "vae")

    @classmethod
    def parts(cls, config: Any) -> tuple[str, ...]:
        """Raises ValueError for unknown encoders."""
        encoders = config.text.encoders
        if encoders not in ENCODERS:
            raise ValueError(
                f"unknown text.encoders {encoders!r}: use one of {', '.join(ENCODERS)}"
            )
        if cls.sees(config) and encoders != "mllm":
            raise ValueError(
                f"--config.text.pictures needs text.encoders=mllm: {encoders} cannot see"
            )
        return (*cls.children, *ENCODERS[encoders])

    def tokenizer(self) -> Any:
        if "t5" not in self.configs:
            return super().tokenizer()
        return T5ClipTokenizer(self.found["t5"].path.parent, self.config.text.length)

    def text_shapes(self, batch: int) -> Any:
        if "t5" not in self.configs:
            return super().text_shapes(batch)
        lengths = (self.config.text.length, CLIP_LENGTH)
        return T5ClipInputs(*(jax.ShapeDtypeStruct((batch, n), "int32") for n in lengths))
