"""LoRA files of every layout, and FLUX.1 with them: diffusers' and ours."""

import contextlib
import functools
import inspect
import re
from collections.abc import Mapping

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers.loaders import lora_conversion_utils, lora_pipeline
from flax import nnx

from converters.lora import PLACES, Lora, sizes_of
from converters.lora_names import LAYOUTS
from converters.safetensors_io import PT, Spec, write
from tests.flux import test_parity as flux_parity
from x2jax.adapters import AdapterConfig, Adapters
from x2jax.flux import TARGET, ImageStream
from x2jax.trees import Skeleton

SMALL = flux_parity.SMALL
HALVES = {"lora-kohya": ("lora_down", "lora_up"), "lora-xlabs": ("down", "up")}
PREFIX = {"lora-peft": "transformer.", "lora-fal": "base_model.model."}
NO_PLACE = {
    "lora-fal": (r".*(_mod|modulation)\.lin\..*", r".*final_layer\.linear\..*"),
    "lora-bfl": (
        r".*(_mod|modulation)\.lin\..*",
        r"(final_layer|(img|txt|time|vector|guidance)_in)\..*",
        r".*norm\.(query|key)_norm\.scale",
    ),
}
"""What these trainers put into every file, and adapters have no place for."""


def lora_file(layout: str, seed: int = 0, dtype=np.float32, flux=SMALL) -> dict[str, np.ndarray]:
    """A file as trainers of a layout write it: every linear, ranks that differ, alpha not rank.

    Parts that adapters have no place for are there where diffusers wants them, and are zero.
    """
    rng = np.random.default_rng(seed)
    down, up = HALVES.get(layout, ("lora_A", "lora_B"))
    out = {}
    for name, target in LAYOUTS[layout].targets(flux).items():
        full = set(target.paths) <= PLACES
        name = PREFIX.get(layout, "") + name
        wanted = any(re.fullmatch(p, f"{name}.") for p in NO_PLACE.get(layout, ()))
        if name.startswith("lora_transformer") or not (full or wanted):
            continue
        rank = int(rng.integers(2, 6))
        inputs, outputs = _shape(name, target, flux) if full else _other(name, flux)
        out[f"{name}.{down}.weight"] = rng.standard_normal((rank, inputs)) / inputs**0.5
        out[f"{name}.{up}.weight"] = rng.standard_normal((outputs, rank)) * full / rank
        if layout in ("lora-kohya", "lora-peft"):
            out[f"{name}.alpha"] = rng.choice([1.0, 3.0, 8.0])
    return {name: np.asarray(x, dtype) for name, x in out.items()}


def _shape(name, target, flux) -> tuple[int, int]:
    ins, outs = zip(*(sizes_of(p, flux) for p in target.paths), strict=True)
    return sum(ins) if target.axis == 1 else ins[0], sum(outs) if target.axis == 0 else outs[0]


def _other(name, flux) -> tuple[int, int]:
    sizes = {
        "img_in": (flux.channels, flux.width),
        "txt_in": (flux.text_width, flux.width),
        "vector_in.in_layer": (flux.pooled_width, flux.width),
        "(time|guidance)_in.in_layer": (256, flux.width),
        ".*_mod.lin": (flux.width, 6 * flux.width),
        ".*modulation.lin": (flux.width, 3 * flux.width),
        ".*final_layer.linear": (flux.width, flux.channels),
        ".*adaLN_modulation.1": (flux.width, 2 * flux.width),
    }
    return next((s for p, s in sizes.items() if re.fullmatch(p, name)), (flux.width, flux.width))


def store(path, tensors: Mapping[str, np.ndarray], metadata=PT):
    """Writes a safetensors file; returns its path."""
    specs = {n: Spec(np.dtype(x.dtype), x.shape) for n, x in tensors.items()}
    write(path, specs, tensors.__getitem__, metadata=metadata)
    return path


@contextlib.contextmanager
def diffusers_at_size(flux):
    """diffusers' converters have FLUX.1-dev's sizes written into them: replaced by a FLUX's."""
    sizes = {
        "num_layers = 19": f"num_layers = {flux.double_blocks}",
        "num_single_layers = 38": f"num_single_layers = {flux.single_blocks}",
        "inner_dim = 3072": f"inner_dim = {flux.width}",
        "3072, 3072, 3072, 12288": f"{flux.width}, {flux.width}, {flux.width}, {flux.mlp_width}",
    }
    kept, used = {}, set()
    for name in (
        "_convert_kohya_flux_lora_to_diffusers",
        "_convert_bfl_flux_control_lora_to_diffusers",
        "_convert_fal_kontext_lora_to_diffusers",
    ):
        kept[name] = getattr(lora_pipeline, name)
        text = inspect.getsource(kept[name])
        for old, new in sizes.items():
            used |= {old} & {s for s in sizes if s in text}
            text = text.replace(old, new)
        namespace = vars(lora_conversion_utils).copy()
        exec(text, namespace)
        setattr(lora_pipeline, name, namespace[name])
    assert used == set(sizes), "diffusers has changed: look at its converters again"
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(lora_pipeline, name, function)


def load_in_diffusers(model: torch.nn.Module, file, flux=SMALL) -> list[str]:
    """Loads a LoRA file through `FluxPipeline`; returns the modules that have it.

    Raises:
      AssertionError: keys that were missing or unexpected, or a LoRA that is zero.
    """
    parts = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipe = diffusers.FluxPipeline(**dict.fromkeys(parts), transformer=model)
    seen = []
    original = diffusers.loaders.peft._maybe_warn_for_unhandled_keys
    diffusers.loaders.peft._maybe_warn_for_unhandled_keys = lambda keys, name: seen.append(keys)
    try:
        with diffusers_at_size(flux):
            pipe.load_lora_weights(str(file), adapter_name="x")
    finally:
        diffusers.loaders.peft._maybe_warn_for_unhandled_keys = original
    (keys,) = seen
    assert not [k for k in keys.unexpected_keys if "lora" in k], keys.unexpected_keys
    assert not [k for k in keys.missing_keys if "lora" in k], keys.missing_keys
    return [n for n, m in model.named_modules() if "x" in getattr(m, "lora_A", {})]


def run_diffusers(model, flux=SMALL) -> np.ndarray:
    """The velocity of fixed inputs."""
    with torch.no_grad():
        return flux_parity.run_reference(model, flux, flux_parity.inputs(flux))[0].numpy()


class Ours:
    """Our FLUX with the weights of diffusers' `model`, to which plain LoRA is added."""

    def __init__(self, model, flux=SMALL):
        self.flux, self.base = flux, flux_parity.build(flux, model)
        self.jit = functools.cache(self._compiled)

    def _compiled(self, config):
        skeleton = Skeleton(nnx.eval_shape(lambda: Adapters(config, self.flux, rngs=nnx.Rngs(0))))
        x, flux = flux_parity.inputs(self.flux), self.flux

        def run(params):
            count = x["img"].shape[:2]
            stream = ImageStream(
                x["img"], jnp.full(count, TARGET), jnp.broadcast_to(x["positions"], (*count, 3))
            )
            guidance = x["guidance"] if flux.guidance else None
            adapters = skeleton.merge(params)
            return self.base(
                stream, x["txt"], x["pooled"], x["t"], guidance, adapters=adapters
            ).velocity_BIC

        return jax.jit(run)

    def __call__(self, config: AdapterConfig, params: Mapping[str, np.ndarray]) -> np.ndarray:
        """The velocity of `run_diffusers`' inputs; parameters relative to `adapter/`."""
        return np.asarray(self.jit(config)({p: jnp.asarray(x) for p, x in params.items()}))

    def of(self, lora: Lora) -> np.ndarray:
        """The same with a LoRA file."""
        return self(lora.config, {p: lora.read(p).astype(np.float32) for p in lora.specs})


def norms(model) -> dict[str, np.ndarray]:
    """The norms of a base under the names of a control LoRA."""
    theirs = {"query": "q", "key": "k"}
    out = {}
    for i, block in enumerate(model.transformer_blocks):
        for stream, added in (("img", ""), ("txt", "added_")):
            for word, letter in theirs.items():
                weight = getattr(block.attn, f"norm_{added}{letter}").weight
                name = f"double_blocks.{i}.{stream}_attn.norm.{word}_norm.scale"
                out[name] = weight.detach().numpy().copy()
    for i, block in enumerate(model.single_transformer_blocks):
        for word, letter in theirs.items():
            weight = getattr(block.attn, f"norm_{letter}").weight
            out[f"single_blocks.{i}.norm.{word}_norm.scale"] = weight.detach().numpy().copy()
    return out
