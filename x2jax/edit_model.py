"""The editing model: everything between a batch and a velocity, and back to pixels."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from converters import alignnet as alignnet_format
from converters.flux_diffusers import flux_table
from converters.load import load, open_weights
from converters.qwen2_5_vl import qwen_table
from converters.vae_diffusers import vae_table
from x2jax import sources
from x2jax.adapters import AdapterConfig, Adapters
from x2jax.alignnet import AlignNet, AlignNetConfig
from x2jax.data.batch import Batch
from x2jax.encoders.qwen2_5_vl import QWEN2_5_VL_7B, Qwen2_5_VL, QwenConfig
from x2jax.encoders.vae import FLUX_VAE, VAE, VAEConfig
from x2jax.flux import FLUX_DEV, Flux, FluxConfig
from x2jax.flux.latents import ImageStream, pack, patchify, unpack_target, unpatchify
from x2jax.sources import Source
from x2jax.trees import Params, Skeleton, child, prefixed, state_params


@dataclasses.dataclass(frozen=True)
class Precision:
    """dtypes by name: of arithmetic, and of the frozen weights. Trainable weights are float32."""

    compute: str
    frozen: str


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


def find_sources(*, flux: str, mllm: str, alignnet: str) -> dict[str, Source]:
    """The frozen children of an `EditModel`, from folders in the public layouts or "tiny".

    Args:
      flux: diffusers folder with transformer/ and vae/.
      mllm: transformers folder of Qwen2.5-VL.
      alignnet: AlignNet file or folder.

    Raises:
      FileNotFoundError: a folder or its config is missing.
      ValueError: a config of another model, or an AlignNet that does not fit the MLLM or FLUX.
    """
    root = sources.folder(flux, "flux", "flux")
    transformer = FluxConfig.from_diffusers(sources.read_config(root / "transformer"))
    vae = VAEConfig.from_diffusers(sources.read_config(root / "vae"))
    qwen_root = sources.folder(mllm, "mllm", "qwen")
    qwen = QwenConfig.from_transformers(sources.read_config(qwen_root))
    align_path = sources.folder(alignnet, "alignnet", "alignnet")
    shapes = {n: tuple(x.shape) for n, x in open_weights(align_path).items()}
    align = AlignNetConfig(**alignnet_format.sizes(shapes))
    expected = (qwen.states, qwen.width, transformer.text_width, transformer.pooled_width)
    found = (align.states, align.width, align.text_width, align.pooled_width)
    if expected != found:
        raise ValueError(
            f"the AlignNet in {align_path} has (states, width, text width, pooled width) "
            f"{found}, this MLLM and FLUX need {expected}: is it the AlignNet of another MLLM?"
        )
    return {
        "flux": Source(root / "transformer", flux_table(transformer), transformer),
        "vae": Source(root / "vae", vae_table(vae), vae),
        "mllm": Source(qwen_root, _qwen_table(qwen_root, qwen), qwen),
        "alignnet": Source(
            align_path, alignnet_format.alignnet_table(align.states, align.mixing), align
        ),
    }


def published_configs() -> dict[str, Any]:
    """Architectures by child as published: FLUX.1-dev, Qwen2.5-VL-7B and its AlignNet."""
    align = AlignNetConfig(QWEN2_5_VL_7B.states, QWEN2_5_VL_7B.width)
    return {"flux": FLUX_DEV, "vae": FLUX_VAE, "mllm": QWEN2_5_VL_7B, "alignnet": align}


def _qwen_table(root: Path, cfg: QwenConfig):
    nested = any(n.startswith("model.language_model.") for n in open_weights(root))
    return qwen_table(cfg, nested=nested)


def configs_of(found: Mapping[str, Source]) -> dict[str, Any]:
    """Architectures by child."""
    return {name: source.config for name, source in found.items()}


def make_skeleton(
    configs: Mapping[str, Any], adapter: AdapterConfig, precision: Precision
) -> Skeleton:
    """The `EditModel` of some architectures by child, without allocating anything."""

    def build():
        return EditModel(**configs, adapter=adapter, precision=precision, rngs=nnx.Rngs(0))

    return Skeleton(nnx.eval_shape(build))


def load_child(
    skeleton: Skeleton, found: Mapping[str, Source], name: str, by_path: Mapping[str, Any]
) -> Params:
    """One child's weights on the devices, placed by `by_path`, through its rule table.

    Raises:
      WeightsError: weights that do not fit; every offender is listed.
    """
    abstract = {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_path[f"{name}/{path}"])
        for path, x in child(skeleton.abstract, name).items()
    }
    return prefixed(load(found[name].path, found[name].table, abstract), name)


def initial_adapter(
    adapter: AdapterConfig, flux: FluxConfig, seed: int, by_path: Mapping[str, Any]
) -> Params:
    """Fresh adapters by path, initialised where they will live, in one program."""

    def init(key):
        module = Adapters(adapter, flux, rngs=nnx.Rngs(params=key))
        return prefixed(state_params(module), "adapter")

    key = jax.random.fold_in(jax.random.key(seed), 0x5EED)
    shapes = jax.eval_shape(init, key)
    return jax.jit(init, out_shardings={p: by_path[p] for p in shapes})(key)
