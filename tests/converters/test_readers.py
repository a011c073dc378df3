"""What we write, read by the code that others read it with: nothing missing, the same outputs."""

import dataclasses
import inspect
import json

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils
from flax import nnx
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from converters import __main__ as cli
from converters import formats
from converters.exporting import write
from converters.load import Imported, open_weights
from converters.rules import plan
from tests import parity
from tests.converters import loras
from tests.converters.test_x2edit import make_run
from tests.flux.test_parity import SMALL, inputs, run_ours, run_reference
from x2jax.adapters import AdapterConfig, Adapters
from x2jax.encoders.qwen2_5_vl import (
    QWEN2_5_VL_3B,
    QWEN2_5_VL_3B_VISION,
    QWEN2_5_VL_7B,
    QWEN2_5_VL_7B_VISION,
    Qwen2_5_VL,
    QwenConfig,
    VisionConfig,
)
from x2jax.encoders.vae import FLUX_VAE, TINY_VAE, VAE
from x2jax.flux import FLUX_DEV, FLUX_SCHNELL, Flux
from x2jax.trees import Skeleton, prefixed

F32 = dict(dtype=jnp.float32, param_dtype=jnp.float32)
SMALL_VAE = dataclasses.replace(TINY_VAE, block_out_channels=(8, 16, 24), norm_num_groups=4)
TEXT = QwenConfig(2, 32, 4, 2, 48, 40, False, (1, 1, 2))
VISION = VisionConfig(2, 32, 2, 24, 32, (1,), patch=4, window=16, image_token=38, video_token=39)


def random_params(make, seed: int = 0):
    """Our module with values that matter, and its parameters by path."""
    skeleton = Skeleton(nnx.eval_shape(make))
    rng = np.random.default_rng(seed)
    params = {}
    for path, x in skeleton.abstract.items():
        noise = rng.standard_normal(x.shape).astype(np.float32)
        fan = np.prod(x.shape[-2:-1]) if path.endswith("kernel") else 25
        params[path] = noise / np.float32(fan**0.5) + np.float32(path.endswith("scale"))
    return skeleton.merge({p: jnp.asarray(x) for p, x in params.items()}), params


def small_flux(cfg=SMALL):
    return random_params(lambda: Flux(cfg, **F32, rngs=nnx.Rngs(0)))


def exported(name, config, params, folder):
    write(formats.FORMATS[name], config, params, folder)
    return folder


def run(command: str, source, out, *options: str) -> int:
    return cli.main([command, "--from", str(source), "--out", str(out), *options])


def nothing_amiss(info) -> None:
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info


@pytest.mark.parametrize("guidance", [True, False])
def test_diffusers_reads_the_transformer(tmp_path, guidance):
    cfg = dataclasses.replace(SMALL, guidance=guidance)
    ours, params = small_flux(cfg)
    # By way of BFL's file: both tables are then in the proof.
    single = exported("flux-bfl", cfg.to_diffusers(), params, tmp_path / "bfl")
    assert run("export", single, tmp_path / "d", "--format", "flux-diffusers") == 0
    model, info = diffusers.FluxTransformer2DModel.from_pretrained(
        tmp_path / "d", output_loading_info=True
    )
    nothing_amiss(info)
    x = inputs(cfg)
    expected = run_reference(model, cfg, x)[0].detach().numpy()
    parity.assert_parity([np.asarray(run_ours(ours, cfg, x))], [expected], 1e-4)


def diffusers_flux_converter(width: int):
    """diffusers' own reader of BFL files; it is written for one width, which becomes ours."""
    name = "convert_flux_transformer_checkpoint_to_diffusers"
    source = inspect.getsource(getattr(single_file_utils, name))
    fixed = "inner_dim = 3072"
    assert source.count(fixed) == 1
    scope = dict(vars(single_file_utils))
    exec(source.replace(fixed, f"inner_dim = {width}"), scope)
    return scope[name]


@pytest.mark.parametrize("guidance", [True, False])
def test_diffusers_converts_our_bfl_file_into_our_diffusers_file(tmp_path, guidance):
    cfg = dataclasses.replace(SMALL, guidance=guidance)
    _, params = small_flux(cfg)
    single = exported("flux-bfl", cfg.to_diffusers(), params, tmp_path / "bfl")
    folder = exported("flux-diffusers", cfg.to_diffusers(), params, tmp_path / "d")
    checkpoint = {n: torch.tensor(np.array(x)) for n, x in open_weights(single).items()}
    equal_states(diffusers_flux_converter(cfg.width)(checkpoint), open_weights(folder))


def equal_states(theirs, ours) -> None:
    assert set(theirs) == set(ours)
    for name, x in ours.items():
        np.testing.assert_array_equal(theirs[name].numpy(), x, err_msg=name)


def test_diffusers_reads_both_layouts_of_the_autoencoder(tmp_path):
    config = SMALL_VAE.to_diffusers()
    ours, params = random_params(lambda: VAE(SMALL_VAE, rngs=nnx.Rngs(0)))
    folder = exported("vae-diffusers", config, params, tmp_path / "d")
    single = exported("vae-bfl", config, params, tmp_path / "bfl") / "ae.safetensors"
    model, info = diffusers.AutoencoderKL.from_pretrained(folder, output_loading_info=True)
    nothing_amiss(info)
    checkpoint = {n: torch.tensor(np.array(x)) for n, x in open_weights(single).items()}
    converted = single_file_utils.convert_ldm_vae_checkpoint(checkpoint, config)
    equal_states(converted, open_weights(folder))
    single_model = diffusers.AutoencoderKL.from_single_file(str(single), config=str(folder))
    rng = np.random.default_rng(0)
    pixels = rng.uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
    z = rng.standard_normal((2, 4, 6, 16)).astype(np.float32)
    mean, logvar = ours.encode(jnp.asarray(pixels))
    outputs = [mean, logvar, ours.decode(jnp.asarray(z))]
    for reader in (model, single_model):
        with torch.no_grad():
            latents = reader.encode(torch.tensor(pixels).permute(0, 3, 1, 2)).latent_dist
            decoded = reader.decode(torch.tensor(z).permute(0, 3, 1, 2)).sample
        found = [x.permute(0, 2, 3, 1).numpy() for x in (latents.mean, latents.logvar, decoded)]
        parity.assert_parity(outputs, found, 1e-4)


@pytest.mark.parametrize("nested", [False, True])
def test_transformers_reads_qwen_with_its_vision_tower(tmp_path, nested):
    text = TEXT.to_transformers()
    config = {"model_type": "qwen2_5_vl", "tie_word_embeddings": False, "text_config": text}
    config |= VISION.to_transformers() | ({"x2jax_nested": True} if nested else {})
    ours, params = random_params(lambda: Qwen2_5_VL(TEXT, VISION, **F32, rngs=nnx.Rngs(0)))
    assert any(p.startswith("visual/") for p in params)
    folder = exported("qwen2.5-vl", config, params, tmp_path / "qwen")
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    nothing_amiss(info)
    ids = np.random.default_rng(0).integers(0, 30, (2, 9))
    with torch.no_grad():
        out = model(input_ids=torch.tensor(ids), output_hidden_states=True)
    states = ours.hidden_states(jnp.asarray(ids), jnp.ones(ids.shape, bool))
    parity.assert_parity(list(states), [x.numpy() for x in out.hidden_states], 1e-4)
    assert run("import", folder, tmp_path / "ours") == 0
    assert run("export", tmp_path / "ours", tmp_path / "again") == 0
    equal_states({n: torch.tensor(np.array(x)) for n, x in open_weights(folder).items()},
                 open_weights(tmp_path / "again"))  # fmt: skip


PLAIN = AdapterConfig(
    experts=0,
    tasks=0,
    rank=4,
    alpha=6.0,
    double=("img_attn/q", "img_attn/proj", "txt_mlp/mlp_out"),
    single=("attn/v", "attn/proj", "mlp/mlp_in"),
)


def lora_run(root, cfg, seed: int = 3):
    """A run whose adapter is not zero, and the adapter."""
    adapters, params = random_params(lambda: Adapters(cfg, SMALL, rngs=nnx.Rngs(0)), seed)
    keys = ("experts", "tasks", "rank", "alpha", "double", "single", "series")
    make_run(root, prefixed(params, "adapter"), cfg, adapter={k: getattr(cfg, k) for k in keys})
    return adapters


@pytest.mark.parametrize("name", ["flux-diffusers", "flux-bfl"])
def test_a_merged_lora_is_the_base_with_its_adapter(tmp_path, name):
    ours, params = small_flux()
    base = exported("flux-diffusers", SMALL.to_diffusers(), params, tmp_path / "base")
    scaled = dataclasses.replace(PLAIN, alpha=PLAIN.alpha * 0.5)
    lora_run(tmp_path / "run", PLAIN)
    adapters = lora_run(tmp_path / "same", scaled)
    options = ["--format", name, "--merge", str(tmp_path / "run"), "--scale", "0.5"]
    assert run("export", base, tmp_path / "merged", *options) == 0
    fmt = formats.FORMATS[name]
    (part,) = fmt.parts(SMALL.to_diffusers())
    read = Imported(fmt.open(tmp_path / "merged"), part.table, part.shapes)
    merged = Skeleton(nnx.eval_shape(lambda: Flux(SMALL, **F32, rngs=nnx.Rngs(0)))).merge(
        {p: jnp.asarray(read(p)) for p in read.specs}
    )
    x = inputs(SMALL)
    wanted = np.asarray(run_ours(ours, SMALL, x, adapters=adapters))
    parity.assert_parity([np.asarray(run_ours(merged, SMALL, x))], [wanted], 1e-4)
    with pytest.raises(AssertionError):
        parity.assert_parity([np.asarray(run_ours(ours, SMALL, x))], [wanted], 1e-2)
    about = json.loads(open_weights(tmp_path / "merged").metadata["x2jax"])
    found = {k: about["merged"][k] for k in ("scale", "step", "rank", "alpha")}
    assert found == {"scale": 0.5, "step": 7, "rank": 4, "alpha": 6.0}


@pytest.mark.parametrize("layout", ["lora-peft", "lora-kohya"])
def test_a_lora_file_is_merged_as_diffusers_fuses_it(tmp_path, layout):
    _, params = small_flux()
    base = exported("flux-diffusers", SMALL.to_diffusers(), params, tmp_path / "base")
    file = tmp_path / "lora" / "lora.safetensors"
    loras.store(file, loras.lora_file(layout))
    model = diffusers.FluxTransformer2DModel.from_pretrained(base)
    plain = loras.run_diffusers(model)
    assert loras.load_in_diffusers(model, file)
    wanted = loras.run_diffusers(model)
    options = ["--merge", str(file), "--scale", "1"]
    assert run("export", base, tmp_path / "merged", *options) == 0
    merged = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "merged")
    found = loras.run_diffusers(merged)
    parity.assert_parity([found], [wanted], 1e-4)
    assert parity.distance([plain], [wanted]) > 1e-2


def test_what_cannot_be_merged_is_refused(tmp_path, capsys):
    _, params = small_flux()
    base = exported("flux-diffusers", SMALL.to_diffusers(), params, tmp_path / "base")
    lora_run(tmp_path / "moe", AdapterConfig(experts=2, rank=4, top_k=1, tasks=3, alpha=4.0))
    assert run("export", base, tmp_path / "out", "--merge", str(tmp_path / "moe")) == 1
    assert "a MoE-LoRA cannot be folded into a weight" in capsys.readouterr().err
    other = dataclasses.replace(SMALL, double_blocks=1)
    exported("flux-diffusers", other.to_diffusers(), small_flux(other)[1], tmp_path / "other")
    lora_run(tmp_path / "plain", PLAIN)
    assert (
        run("export", tmp_path / "other", tmp_path / "out", "--merge", str(tmp_path / "plain")) == 1
    )
    assert "mis-shaped: double_blocks/img_attn/q/kernel is (1, 32, 32)" in capsys.readouterr().err
    assert (
        run("export", tmp_path / "moe", tmp_path / "out", "--merge", str(tmp_path / "plain")) == 1
    )
    assert "--merge needs a base in --from" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cfg", [FLUX_DEV, FLUX_SCHNELL], ids=["dev", "schnell"])
def test_full_size_names_and_shapes_of_both_transformer_layouts(cfg):
    config = cfg.to_diffusers()
    with torch.device("meta"):
        keys = {k: v for k, v in config.items() if not k.startswith("_")}
        reference = diffusers.FluxTransformer2DModel(**keys).state_dict()
    (folder,), (single,) = (
        formats.FORMATS[n].parts(config) for n in ("flux-diffusers", "flux-bfl")
    )
    found = {n: e.shape for n, e in plan(folder.table, folder.shapes).entries.items()}
    assert found == {n: tuple(x.shape) for n, x in reference.items()}
    bfl = {n: e.shape for n, e in plan(single.table, single.shapes).entries.items()}
    assert len(bfl) == (780 if cfg.guidance else 776)
    assert bfl["double_blocks.18.img_attn.qkv.weight"] == (9216, 3072)
    assert bfl["single_blocks.37.linear1.weight"] == (21504, 3072)
    assert formats.flux.flux_bfl.sizes(bfl) == config
    assert single.file == f"flux1-{'dev' if cfg.guidance else 'schnell'}.safetensors"
    # diffusers' reader takes these names, all of them, into those.
    states = {n: torch.empty(s, device="meta") for n, s in bfl.items()}
    converted = diffusers_flux_converter(cfg.width)(states)
    assert {n: tuple(x.shape) for n, x in converted.items()} == found and not states


def test_full_size_names_and_shapes_of_both_autoencoder_layouts():
    config = FLUX_VAE.to_diffusers()
    with torch.device("meta"):
        keys = {k: v for k, v in config.items() if not k.startswith("_")}
        reference = diffusers.AutoencoderKL(**keys).state_dict()
    (folder,), (single,) = (formats.FORMATS[n].parts(config) for n in ("vae-diffusers", "vae-bfl"))
    found = {n: e.shape for n, e in plan(folder.table, folder.shapes).entries.items()}
    assert found == {n: tuple(x.shape) for n, x in reference.items()}
    bfl = {n: e.shape for n, e in plan(single.table, single.shapes).entries.items()}
    assert bfl["encoder.down.1.block.0.nin_shortcut.weight"] == (256, 128, 1, 1)
    assert bfl["decoder.up.3.upsample.conv.weight"] == (512, 512, 3, 3)
    assert bfl["decoder.mid.attn_1.proj_out.weight"] == (512, 512, 1, 1)
    assert formats.vae.vae_bfl.sizes(bfl) == config
    states = {n: torch.empty(s, device="meta") for n, s in bfl.items()}
    converted = single_file_utils.convert_ldm_vae_checkpoint(states, config)
    assert {n: tuple(x.shape) for n, x in converted.items()} == found


@pytest.mark.parametrize(
    ("text", "vision"),
    [(QWEN2_5_VL_7B, QWEN2_5_VL_7B_VISION), (QWEN2_5_VL_3B, QWEN2_5_VL_3B_VISION)],
    ids=["7B", "3B"],
)
def test_full_size_names_and_shapes_of_qwen(text, vision):
    config = {"tie_word_embeddings": text.tied, "text_config": text.to_transformers()}
    config |= vision.to_transformers()
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))
    wanted = {n: tuple(x.shape) for n, x in model.state_dict().items()}
    if text.tied:
        del wanted["lm_head.weight"]
    fmt = formats.FORMATS["qwen2.5-vl"]
    (part,) = fmt.parts({"model_type": "qwen2_5_vl", **config, "x2jax_nested": True})
    assert {n: e.shape for n, e in plan(part.table, part.shapes).entries.items()} == wanted
