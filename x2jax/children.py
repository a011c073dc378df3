"""The parts that models are made of: how each is built, and where its weights come from.

A recipe names the children that it needs; `x2jax.model.Model` holds them under these names, which
parameter paths, sharding rules and checkpoints begin with.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from converters import alignnet as alignnet_format
from converters.clip import clip_table, prefix_of
from converters.flux_diffusers import flux_table
from converters.load import load, open_weights
from converters.qwen2_5_vl import qwen_table
from converters.t5 import embedding_of, t5_table
from converters.vae_diffusers import vae_table
from x2jax import sources
from x2jax.adapters import Adapters
from x2jax.alignnet import AlignNet, AlignNetConfig
from x2jax.control import LightControl
from x2jax.encoders.clip import CLIP_L, CLIPConfig, CLIPText
from x2jax.encoders.qwen2_5_vl import (
    QWEN2_5_VL_7B,
    QWEN2_5_VL_7B_VISION,
    Qwen2_5_VL,
    QwenConfig,
    VisionConfig,
)
from x2jax.encoders.t5 import T5_XXL, T5Config, T5Encoder
from x2jax.encoders.vae import FLUX_VAE, VAE, VAEConfig
from x2jax.flux import FLUX_DEV, Flux, FluxConfig
from x2jax.sources import Source
from x2jax.trees import Params, Skeleton, child, prefixed, state_params

Configs = Mapping[str, Any]
"""Child -> its architecture."""


@dataclasses.dataclass(frozen=True)
class Precision:
    """dtypes by name: of arithmetic, and of the frozen weights. Trainable weights are float32."""

    compute: str
    frozen: str

    @property
    def layers(self) -> dict[str, Any]:
        """Keyword arguments of a module that may be frozen."""
        return dict(dtype=jnp.dtype(self.compute), param_dtype=jnp.dtype(self.frozen))


@dataclasses.dataclass(frozen=True)
class MLLMConfig:
    """The multimodal LLM: its language model, and its vision tower where images are conditions."""

    text: QwenConfig
    vision: VisionConfig | None = None


@dataclasses.dataclass(frozen=True)
class Child:
    """One kind of part.

    Attributes:
      build: all architectures, precision and rngs -> module.
      option: config key that says where its weights are; "" for what is always made fresh.
      find: value of the option, and whether images are conditions -> `Source`.
      published: architecture as published, for planning without files.
    """

    build: Callable[[Configs, Precision, nnx.Rngs], nnx.Module]
    option: str = ""
    find: Callable[[str, bool], Source] | None = None
    published: Any = None


def _find_flux(value: str, _: bool) -> Source:
    root = sources.folder(value, "flux", "flux") / "transformer"
    cfg = FluxConfig.from_diffusers(sources.read_config(root))
    return Source(root, flux_table(cfg), cfg)


def _find_vae(value: str, _: bool) -> Source:
    root = sources.folder(value, "flux", "flux") / "vae"
    cfg = VAEConfig.from_diffusers(sources.read_config(root))
    return Source(root, vae_table(cfg), cfg)


def _find_mllm(value: str, vision: bool) -> Source:
    root = sources.folder(value, "mllm", "qwen")
    config = sources.read_config(root)
    text = QwenConfig.from_transformers(config)
    tower = VisionConfig.from_transformers(config) if vision else None
    nested = any(n.startswith("model.language_model.") for n in open_weights(root))
    return Source(root, qwen_table(text, nested=nested, vision=tower), MLLMConfig(text, tower))


def _find_alignnet(value: str, _: bool) -> Source:
    path: Path = sources.folder(value, "alignnet", "alignnet")
    shapes = {n: tuple(x.shape) for n, x in open_weights(path).items()}
    cfg = AlignNetConfig(**alignnet_format.sizes(shapes))
    return Source(path, alignnet_format.alignnet_table(cfg.states, cfg.mixing), cfg)


def _find_t5(value: str, _: bool) -> Source:
    root = sources.folder(value, "flux", "flux") / "text_encoder_2"
    cfg = T5Config.from_transformers(sources.read_config(root))
    return Source(root, t5_table(cfg, embedding=embedding_of(open_weights(root))), cfg)


def _find_clip(value: str, _: bool) -> Source:
    root = sources.folder(value, "flux", "flux") / "text_encoder"
    cfg = CLIPConfig.from_transformers(sources.read_config(root))
    return Source(root, clip_table(cfg, prefix=prefix_of(open_weights(root))), cfg)


def _build_mllm(configs: Configs, precision: Precision, rngs: nnx.Rngs) -> nnx.Module:
    cfg: MLLMConfig = configs["mllm"]
    return Qwen2_5_VL(cfg.text, cfg.vision, rngs=rngs, **precision.layers)


CHILDREN: dict[str, Child] = {
    "flux": Child(
        lambda c, p, rngs: Flux(c["flux"], rngs=rngs, **p.layers), "flux", _find_flux, FLUX_DEV
    ),
    "vae": Child(
        lambda c, p, rngs: VAE(c["vae"], rngs=rngs, **p.layers), "flux", _find_vae, FLUX_VAE
    ),
    "mllm": Child(_build_mllm, "mllm", _find_mllm, MLLMConfig(QWEN2_5_VL_7B)),
    "alignnet": Child(
        lambda c, p, rngs: AlignNet(
            c["alignnet"], dtype=jnp.dtype(p.compute), param_dtype=jnp.float32, rngs=rngs
        ),
        "alignnet",
        _find_alignnet,
        AlignNetConfig(QWEN2_5_VL_7B.states, QWEN2_5_VL_7B.width),
    ),
    "adapter": Child(lambda c, p, rngs: Adapters(c["adapter"], c["flux"], rngs=rngs)),
    "t5": Child(
        lambda c, p, rngs: T5Encoder(c["t5"], rngs=rngs, **p.layers), "flux", _find_t5, T5_XXL
    ),
    "clip": Child(
        lambda c, p, rngs: CLIPText(c["clip"], rngs=rngs, **p.layers), "flux", _find_clip, CLIP_L
    ),
    "control": Child(
        lambda c, p, rngs: LightControl(
            c["control"], c["flux"], dtype=jnp.dtype(p.compute), rngs=rngs
        )
    ),
}


def options(names: Iterable[str]) -> tuple[str, ...]:
    """Config keys that say where some children's weights are."""
    return tuple(dict.fromkeys(o for n in names if (o := CHILDREN[n].option)))


def find_sources(
    config: Mapping[str, Any], names: Iterable[str], *, vision: bool = False
) -> dict[str, Source]:
    """Children's weights, from folders in the public layouts or "tiny".

    Args:
      config: option -> where: the embedded family, a folder or a file.
      names: of children.
      vision: whether the MLLM brings its vision tower.

    Raises:
      ValueError: options that are unset, with how to get each; a config of another model; children
        that do not fit each other.
      FileNotFoundError: a folder or its config is missing.
    """
    names = tuple(names)
    sources.require(config, options(names))
    found = {}
    for name in names:
        find = CHILDREN[name].find
        if find is None:
            raise ValueError(f"{name} has no published weights: it is made fresh")
        found[name] = find(config[CHILDREN[name].option], vision)
    check_fit(configs_of(found), {name: str(s.path) for name, s in found.items()})
    return found


def check_fit(configs: Configs, where: Mapping[str, str]) -> None:
    """Raises ValueError where AlignNet, T5 or CLIP do not fit the MLLM or FLUX."""
    if "flux" not in configs:
        return
    flux = configs["flux"]
    if {"mllm", "alignnet"} <= set(configs):
        mllm, align = configs["mllm"].text, configs["alignnet"]
        expected = (mllm.states, mllm.width, flux.text_width, flux.pooled_width)
        found = (align.states, align.width, align.text_width, align.pooled_width)
        if expected != found:
            raise ValueError(
                f"the AlignNet in {where['alignnet']} has (states, width, text width, pooled "
                f"width) {found}, this MLLM and FLUX need {expected}: is it the AlignNet of "
                "another MLLM?"
            )
    for name, takes in (("t5", flux.text_width), ("clip", flux.pooled_width)):
        if name in configs and configs[name].width != takes:
            raise ValueError(
                f"the {name} in {where[name]} is {configs[name].width} wide, this FLUX needs "
                f"{takes}: is it another model's text encoder?"
            )


def configs_of(found: Mapping[str, Source]) -> dict[str, Any]:
    """Architectures by child."""
    return {name: source.config for name, source in found.items()}


def published_configs(names: Iterable[str], *, vision: bool = False) -> dict[str, Any]:
    """Architectures by child as published: FLUX.1-dev, Qwen2.5-VL-7B and its AlignNet.

    Args:
      vision: whether the MLLM brings its vision tower.
    """
    configs = {name: CHILDREN[name].published for name in names}
    if vision and "mllm" in configs:
        configs["mllm"] = dataclasses.replace(configs["mllm"], vision=QWEN2_5_VL_7B_VISION)
    return configs


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


def fresh_child(
    configs: Configs, precision: Precision, name: str, seed: int, by_path: Mapping[str, Any]
) -> Params:
    """One child as initialised, float32, made where it will live in one program."""
    full = Precision(compute=precision.compute, frozen="float32")

    def init(key):
        module = CHILDREN[name].build(configs, full, nnx.Rngs(params=key))
        return prefixed(state_params(module), name)

    key = jax.random.fold_in(jax.random.key(seed), 1 + list(CHILDREN).index(name))
    shapes = jax.eval_shape(init, key)
    return jax.jit(init, out_shardings={p: by_path[p] for p in shapes})(key)
