"""X2Edit: task-aware MoE-LoRA on a frozen FLUX.1, conditioned by Qwen2.5-VL through AlignNet."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from x2jax import flow, losses
from x2jax.adapters import AdapterConfig, Adapters
from x2jax.alignnet import AlignNet, AlignNetConfig
from x2jax.data.batch import Batch
from x2jax.encoders.qwen2_5_vl import Qwen2_5_VL, QwenConfig
from x2jax.encoders.vae import VAE, VAEConfig
from x2jax.flux import TARGET, Flux, FluxConfig
from x2jax.flux.latents import ImageStream, pack, patchify, unpack_target, unpatchify
from x2jax.step import Metrics
from x2jax.trees import Params, Skeleton


@dataclasses.dataclass(frozen=True)
class Precision:
    """dtypes by name: of arithmetic, and of the frozen weights. Trainable weights are float32."""

    compute: str
    frozen: str


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


class EditModel(nnx.Module):
    """Everything between a batch and a velocity; children are named as the parameter paths."""

    def __init__(
        self,
        flux: FluxConfig,
        vae: VAEConfig,
        mllm: QwenConfig,
        alignnet: AlignNetConfig,
        adapter: AdapterConfig,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        dtype, frozen = jnp.dtype(precision.compute), jnp.dtype(precision.frozen)
        self.flux = Flux(flux, dtype=dtype, param_dtype=frozen, rngs=rngs)
        self.vae = VAE(vae, dtype=dtype, param_dtype=frozen, rngs=rngs)
        self.mllm = Qwen2_5_VL(mllm, dtype=dtype, param_dtype=frozen, rngs=rngs)
        self.alignnet = AlignNet(alignnet, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)
        self.adapter = Adapters(adapter, flux, rngs=rngs)

    def condition(
        self, text_ids: Int[Array, "B T"], text_mask: Array
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B P"]]:
        """Text features and pooled vector; no gradient enters the MLLM."""
        states = jax.lax.stop_gradient(self.mllm.hidden_states(text_ids, text_mask))
        return self.alignnet(states)

    def encode(self, batch: Batch, key: PRNGKeyArray, objective: Objective) -> ImageStream:
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
        stream = pack(jnp.moveaxis(patches, 0, 1), grids, objective.tokens, objective.source_offset)
        return jax.tree.map(jax.lax.stop_gradient, stream)

    def decode(self, stream: ImageStream, batch: Batch) -> Float[Array, "B Hc Wc 3"]:
        """Target tokens to pixels in [-1, 1] on the canvas."""
        factor = self.vae.cfg.factor
        height, width = (n // (2 * factor) for n in batch.pixels.shape[2:4])
        grids = batch.sizes[:, 0] // (2 * factor)
        latents = unpatchify(unpack_target(stream.tokens_BIC, grids, height, width))
        return self.vae.decode(self.vae.denormalise(latents), batch.sizes[:, 0])


@dataclasses.dataclass(frozen=True)
class X2Edit:
    """The recipe's pure functions over `Params`.

    Attributes:
      skeleton: of an `EditModel`.
      objective: what is minimised.
      remat: remat policy of the blocks.
    """

    skeleton: Skeleton
    objective: Objective
    remat: str

    def loss(
        self, params: Params, frozen: Params, batch: Batch, key: PRNGKeyArray
    ) -> tuple[Array, Metrics]:
        """Flow loss + weight x contrastive loss of one batch, and both apart.

        `count_lonely` counts anchors without a positive in the batch.
        """
        u_key, latent_key, noise_key = jax.random.split(key, 3)
        u = flow.sample_u(u_key, batch.task.shape, self.objective.density)
        flow_B, probes = self.flow_loss(
            params, frozen, batch, flow.sigma_from_u(u), latent_key, noise_key
        )
        total = flow_B.mean()
        metrics = {"flow": total}
        if self.objective.contrastive:
            contrastive = losses.contrastive_loss(
                probes,
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
    ) -> tuple[Float[Array, "B"], Any]:
        """Flow loss of every sample at given sigmas, and the contrastive probes (None if off)."""
        model: EditModel = self.skeleton.merge(params, frozen)
        clean = model.encode(batch, latent_key, self.objective)
        is_target = clean.roles_BI == TARGET
        noise = jax.random.normal(noise_key, clean.tokens_BIC.shape)
        x_t = flow.noised(clean.tokens_BIC, noise, sigma_B)
        stream = clean._replace(tokens_BIC=jnp.where(is_target[..., None], x_t, clean.tokens_BIC))
        probe = None
        if self.objective.contrastive:
            probe = losses.gram_probe(is_target, stop_gradient=self.objective.stop_gradient)
        out = self._velocity(model, stream, sigma_B, batch, self.objective.guidance, probe)
        weight = flow.weight(sigma_B, self.objective.density)
        target = noise - clean.tokens_BIC
        return losses.flow_loss(out.velocity_BIC, target, is_target, weight), out.probes

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
        model: EditModel = self.skeleton.merge(params, frozen)
        latent_key, noise_key = jax.random.split(key)
        clean = model.encode(batch, latent_key, self.objective)
        is_target = (clean.roles_BI == TARGET)[..., None]
        text = model.condition(batch.text_ids, batch.text_mask)

        def velocity(x, sigma_B):
            stream = clean._replace(tokens_BIC=jnp.where(is_target, x, clean.tokens_BIC))
            return self._velocity(model, stream, sigma_B, batch, guidance, None, text).velocity_BIC

        count_B = is_target.sum(axis=(1, 2))
        mu = flow.shift_mu(count_B) if shift else jnp.zeros(count_B.shape)
        noise = jax.random.normal(noise_key, clean.tokens_BIC.shape)
        x = flow.euler(velocity, noise, flow.sample_sigmas(steps, mu))
        return model.decode(clean._replace(tokens_BIC=x), batch)

    def _velocity(self, model, stream, sigma_B, batch, guidance, probe, text=None):
        txt, pooled = model.condition(batch.text_ids, batch.text_mask) if text is None else text
        scale = jnp.full(sigma_B.shape, guidance) if model.flux.cfg.guidance else None
        return model.flux(
            stream,
            txt,
            pooled,
            sigma_B,
            scale,
            adapters=model.adapter,
            task_BD=model.adapter.task(batch.task),
            probe=probe,
            remat=self.remat,
        )
