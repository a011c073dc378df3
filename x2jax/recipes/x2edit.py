"""X2Edit: task-aware MoE-LoRA on a frozen FLUX.1, conditioned by Qwen2.5-VL through AlignNet."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from x2jax import flow, losses, sources
from x2jax.adapters import AdapterConfig
from x2jax.data import transforms
from x2jax.data.batch import Batch
from x2jax.data.edits import BUCKETS, EditData
from x2jax.edit_model import (
    EditModel,
    Precision,
    configs_of,
    find_sources,
    initial_adapter,
    load_child,
    make_skeleton,
    published_configs,
)
from x2jax.encoders.tokenize import TextTokenizer
from x2jax.flux import TARGET
from x2jax.sources import Source
from x2jax.step import Metrics
from x2jax.trees import Params, Skeleton, check_rules, child, fingerprint, matches


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


@dataclasses.dataclass(frozen=True)
class EditObjective:
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
        clean = self._encode(model, batch, latent_key)
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
        clean = self._encode(model, batch, latent_key)
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

    def _encode(self, model, batch, key):
        return model.encode(batch, key, self.objective.tokens, self.objective.source_offset)


@dataclasses.dataclass(frozen=True)
class X2Edit(EditObjective):
    """The recipe: the objective with its weights and data. What `train` asks of any recipe.

    Attributes:
      trainable: rules on paths that say what trains.
      adapter: configuration of the adapters.
      found: sources of the frozen weights.
      data: training and held-out batches.
      previews: arguments of `edit` for sample grids.
    """

    trainable: tuple[str, ...]
    adapter: AdapterConfig
    found: dict[str, Source]
    data: EditData
    previews: dict[str, Any]

    @property
    def trainable_abstract(self) -> Params:
        """Shapes of the trainable tree; float32 masters."""
        return masters(self.skeleton, self.trainable)

    @property
    def source_paths(self) -> dict[str, str]:
        """Where each frozen child came from."""
        return {name: str(source.path) for name, source in self.found.items()}

    def load_frozen(self, by_path: dict) -> Params:
        """All weights that do not train."""
        params = {}
        for name in self.found:
            if not all(p in self.trainable_abstract for p in self.paths(name)):
                params |= load_child(self.skeleton, self.found, name, by_path)
        return {p: x for p, x in params.items() if p not in self.trainable_abstract}

    def initial(self, seed: int, by_path: dict) -> Params:
        """The trainable tree at step 0: fresh adapters, everything else as its source has it."""
        flux = self.found["flux"].config
        params = initial_adapter(self.adapter, flux, seed, by_path)
        for name in self.found:
            if any(p in self.trainable_abstract for p in self.paths(name)):
                params |= load_child(self.skeleton, self.found, name, by_path)
        return {p: params[p].astype(x.dtype) for p, x in self.trainable_abstract.items()}

    def paths(self, name: str) -> list[str]:
        """Paths of one child."""
        return [f"{name}/{p}" for p in child(self.skeleton.abstract, name)]

    def fingerprints(self, frozen: Params) -> dict[str, str]:
        """One a frozen child: tells whether a run goes on with the weights it began with."""
        names = sorted({p.split("/")[0] for p in frozen})
        return {name: fingerprint(child(frozen, name)) for name in names}

    def preview(self, params: Params, frozen: Params, batch: Batch) -> Float[Array, "B Hc Wc 3"]:
        """Edits for the sample grid, from fixed noise."""
        return self.edit(params, frozen, batch, jax.random.key(0), **self.previews)


def masters(skeleton: Skeleton, trainable: tuple[str, ...]) -> Params:
    """Shapes of what trains, in float32."""
    return {
        p: jax.ShapeDtypeStruct(x.shape, jnp.float32)
        for p, x in skeleton.abstract.items()
        if matches(p, trainable)
    }


def build(config: Any, workdir: Path, mesh: Mesh) -> X2Edit:
    """Opens everything that a config names; loads no weights yet.

    Raises:
      ValueError, FileNotFoundError, TypeError: sources that are unset, missing or do not fit, and
      config keys that do not exist.
    """
    sources.require(config, ("flux", "mllm", "alignnet", "data"))
    found = find_sources(flux=config.flux, mllm=config.mllm, alignnet=config.alignnet)
    skeleton, trainable = _model(config, configs_of(found))
    text = config.text
    tokenize = TextTokenizer(found["mllm"].path, text.length, text.template)
    data = EditData(
        config.data,
        workdir,
        tokenize,
        seed=config.seed,
        batch_size=config.batch_size,
        held_out=config.held_out,
        language=text.language,
        workers=config.workers,
        **config.image,
        **config.sampler,
    )
    cell = 2 * found["vae"].config.factor
    data.check(cell=cell, tokens=config.objective.tokens)
    return X2Edit(
        skeleton=skeleton,
        objective=Objective(**config.objective),
        remat=config.remat,
        trainable=trainable,
        adapter=AdapterConfig(**config.adapter),
        found=found,
        data=data,
        previews=dict(config.preview),
    )


def outline(config: Any) -> tuple[EditObjective, tuple[str, ...], Batch]:
    """What a config compiles to, without weights or data: for `x2jax.plan`.

    Architectures come from the folders that the config names; those it leaves out are the
    published ones.

    Returns:
      The objective, the rules of what trains, and the shapes of a micro-batch.
    """
    configs = published_configs()
    if config.flux or config.mllm or config.alignnet:
        sources.require(config, ("flux", "mllm", "alignnet"))
        found = find_sources(flux=config.flux, mllm=config.mllm, alignnet=config.alignnet)
        configs = configs_of(found)
    skeleton, trainable = _model(config, configs)
    objective = EditObjective(skeleton, Objective(**config.objective), config.remat)
    count, slots = config.batch_size, config.image.slots
    height, width = transforms.canvas_size(BUCKETS[config.image.buckets])

    def array(dtype: str, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((count, *shape), dtype)

    batch = Batch(
        pixels=array("uint8", slots, height, width, 3),
        sizes=array("int32", slots, 2),
        text_ids=array("int32", config.text.length),
        text_mask=array("bool", config.text.length),
        task=array("int32"),
        sample_id=array("int32"),
    )
    return objective, trainable, batch


def _model(config: Any, configs: dict[str, Any]) -> tuple[Skeleton, tuple[str, ...]]:
    adapter = AdapterConfig(**config.adapter)
    skeleton = make_skeleton(configs, adapter, Precision(**config.precision))
    trainable = tuple(config.trainable)
    check_rules(skeleton.paths, trainable, "--config.trainable")
    return skeleton, trainable
