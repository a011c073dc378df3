"""The bundle for diffusers users: the same edit as x2jax, strict, beside ordinary LoRAs."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from configs.x2edit import get_config
from converters import __main__ as cli
from tests.converters.loras import lora_file, store
from x2jax import flow
from x2jax.checkpoint import Checkpointer
from x2jax.data.batch import Batch
from x2jax.encoders.tokenize import TextTokenizer
from x2jax.flux import FLUX_TINY
from x2jax.flux.latents import SOURCE, TARGET
from x2jax.model import Model, make_skeleton
from x2jax.recipes import recipe_class
from x2jax.sources import TINY
from x2jax.state import TrainState
from x2jax.trained import open_trained

STEPS, GUIDANCE, TASK = 4, 2.5, "colour change"
PROMPT = "make the red circle blue"
FLUX = TINY / "flux"
SHARING = Path(__file__).parents[2] / "docs" / "sharing.md"


def config():
    c = get_config().unlock()
    c.preview.update(steps=STEPS, guidance=GUIDANCE)
    c.text.update(length=80, template="published")
    return c


@pytest.fixture(scope="module")
def recipe():
    return recipe_class("x2edit").open(config())


@pytest.fixture(scope="module")
def params(recipe):
    """A trained tree in which nothing is zero and every part changes the edit."""
    rng = np.random.default_rng(0)
    out = {}
    for path, x in recipe.trainable_abstract.items():
        size = 1 if path.endswith("embedding") else 1 / np.sqrt(np.prod(x.shape[:-1][-2:]))
        out[path] = (size * rng.standard_normal(x.shape)).astype(np.float32)
    return out


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, params):
    root = tmp_path_factory.mktemp("pipeline")
    checkpoints = Checkpointer(root / "run", every=1, keep=1)
    state = TrainState(np.int32(7), jax.tree.map(jnp.asarray, params), {}, {})
    checkpoints.save(7, state, {"config": json.loads(config().to_json())}, force=True)
    checkpoints.close()
    out = root / "bundle"
    command = ["export", "--from", str(root / "run"), "--out", str(out), "--dtype", "float32"]
    assert cli.main([*command, "--format", "diffusers-pipeline"]) == 0
    return out


@pytest.fixture(scope="module")
def qwen():
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(TINY / "qwen", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "qwen")
    return {"mllm": model.eval(), "mllm_tokenizer": tokenizer}


@pytest.fixture(scope="module")
def pipe(bundle, qwen):
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        str(FLUX), custom_pipeline=str(bundle), adapter=str(bundle), trust_remote_code=True, **qwen
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture() -> Image.Image:
    rng = np.random.default_rng(1)
    return Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((64, 64))


class Ours:
    """The edit of x2jax: noise, source latents, latents after every step, picture."""

    def __init__(self, recipe, params, monkeypatch):
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        frozen = recipe.load_frozen(dict.fromkeys(recipe.skeleton.paths, here))
        pixels = np.zeros((1, 2, 64, 64, 3), np.uint8)
        pixels[0, 1] = np.asarray(picture())
        text = TextTokenizer(TINY / "qwen", 80, "published")([PROMPT])
        batch = Batch(
            pixels=jnp.asarray(pixels),
            sizes=jnp.full((1, 2, 2), 64, jnp.int32),
            text=jax.tree.map(jnp.asarray, text),
            task=jnp.asarray([5]),
            sample_id=jnp.zeros((1,), jnp.int32),
        )

        def euler(velocity, noise, sigmas):
            def body(x, pair):
                x = x + (pair[1] - pair[0])[:, None, None] * velocity(x, pair[0])
                return x, x

            xs = jax.lax.scan(body, noise, (sigmas[:, :-1].T, sigmas[:, 1:].T))[1]
            return {"noise": noise, "steps": xs}

        def decode(self, stream, batch):
            last = stream._replace(tokens_BIC=stream.tokens_BIC["steps"][-1])
            return stream, original(self, last, batch)

        original = Model.decode
        monkeypatch.setattr(flow, "euler", euler)
        monkeypatch.setattr(Model, "decode", decode)

        def run(params, frozen, batch, key):
            model = recipe.skeleton.merge(params, frozen)
            clean = recipe._encode(model, batch, jax.random.split(key)[0])
            edited = recipe.edit(params, frozen, batch, key, steps=STEPS, guidance=GUIDANCE)
            return clean, model.condition(batch.text), edited

        clean, self.condition, (stream, pixels) = jax.jit(run)(
            params, frozen, batch, jax.random.key(3)
        )
        target = np.asarray(clean.roles_BI[0]) == TARGET
        source = np.asarray(clean.roles_BI[0]) == SOURCE
        self.source = np.asarray(clean.tokens_BIC)[:, source]
        self.noise = np.asarray(stream.tokens_BIC["noise"])[:, target]
        self.steps = np.asarray(stream.tokens_BIC["steps"])[:, :, target]
        self.pixels = np.asarray(pixels)[0]


@pytest.fixture(scope="module")
def ours(recipe, params):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return Ours(recipe, params, monkeypatch)


def module_of(pipe):
    """The module that `pipeline.py` was loaded as."""
    return sys.modules[type(pipe).__module__]


def edit(pipe, ours, **kw):
    """The latents after every step, and the picture, of the PyTorch pipeline."""
    steps, step = [], pipe.scheduler.step

    def recorded(*args, **kwargs):
        out = step(*args, **kwargs)
        steps.append(out[0].numpy())
        return out

    source = module_of(pipe).unpack(torch.tensor(ours.source), 8, 8)
    pipe.scheduler.step, pipe.encode = recorded, lambda *_: source
    try:
        call = {"prompt": PROMPT, "task": TASK} | kw
        out = pipe(**call, image=picture(), latents=torch.tensor(ours.noise))
    finally:
        del pipe.scheduler.step, pipe.encode
    return np.stack(steps), out.images[0]


def test_the_edit_is_that_of_x2jax(pipe, ours):
    module = module_of(pipe)
    tokens = module.tokenize(pipe.mllm_tokenizer, PROMPT, **pipe.settings["text"])
    with torch.no_grad():
        text = module.condition(pipe.mllm, pipe.alignnet, *tokens)
    for a, b in zip(text, ours.condition, strict=True):
        np.testing.assert_allclose(a.numpy(), b, atol=1e-4 * np.abs(b).max())
    steps, image = edit(pipe, ours)
    assert steps.shape == ours.steps.shape == (STEPS, 1, 64, FLUX_TINY.channels)
    assert np.abs(steps - ours.steps).max() < 1e-3
    expected = np.clip(np.rint((ours.pixels + 1) * 127.5), 0, 255)
    assert np.abs(np.asarray(image, np.float32) - expected).max() <= 1
    # What the edit depends on: a difference that the comparison would not miss.
    for other in ({"task": "unknown"}, {"prompt": "x"}, {"guidance_scale": 1.0}):
        assert np.abs(edit(pipe, ours, **other)[0] - ours.steps).max() > 0.01, other


def test_pads_see_what_they_saw_where_alignnets_were_trained(pipe, recipe, params, monkeypatch):
    text = dataclasses.replace(recipe.configs["mllm"].text, pad_attention="all")
    mllm = dataclasses.replace(recipe.configs["mllm"], text=text)
    configs = {"mllm": mllm, "alignnet": recipe.configs["alignnet"]}
    skeleton = make_skeleton(configs, recipe.precision)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    weights = recipe.load_frozen(dict.fromkeys(recipe.skeleton.paths, here)) | params
    own = {p: weights[p] for p in skeleton.paths}
    expected = jax.jit(lambda p, x: skeleton.merge(p).condition(x))(
        own, TextTokenizer(TINY / "qwen", 80, "published")([PROMPT])
    )
    module = module_of(pipe)
    tokens = module.tokenize(pipe.mllm_tokenizer, PROMPT, **pipe.settings["text"])

    def gap():
        with torch.no_grad():
            found = module.condition(pipe.mllm, pipe.alignnet, *tokens)
        return max(
            np.abs(a.numpy() - b).max() / np.abs(b).max()
            for a, b in zip(found, expected, strict=True)
        )

    assert gap() > 1e-2, "the tiny family's pads see themselves alone"
    monkeypatch.setattr(pipe.mllm.config, "pad_attention", "all")
    assert gap() < 1e-4


def test_every_part_of_the_adapter_matters(pipe, ours):
    """Perturbing any kind of tensor, in the first block of each kind, changes the velocity."""
    s, module = pipe.settings, module_of(pipe)
    ids = [module.positions(4, 4, i, s["source_offset"]) for i in (0, 1)]
    tokens = module.tokenize(pipe.mllm_tokenizer, PROMPT, **s["text"])
    noise, source = (torch.tensor(x[:, :16]) for x in (ours.noise, ours.source))
    one = torch.ones(1)

    @torch.no_grad()
    def velocity():
        text = module.condition(pipe.mllm, pipe.alignnet, *tokens)
        v = module.velocity(
            pipe.transformer, noise, source, torch.cat(ids), *text, one, 3.5 * one,
            torch.tensor([5]),
        )  # fmt: skip
        return v.numpy()

    expected, unseen = velocity(), []
    np.testing.assert_allclose(velocity(), expected, atol=1e-6)
    names = [n for n, _ in pipe.transformer.x2edit.named_parameters()]
    assert len({n.split(".", 2)[2] for n in names if "blocks" in n}) == 3 * len("qkv") + 3
    own = {
        n: p for n, p in pipe.transformer.x2edit.named_parameters() if ".0." in n or "tasks" in n
    }
    generator = torch.Generator().manual_seed(0)
    for name, p in [*own.items(), *pipe.alignnet.named_parameters()]:
        kept = p.clone()
        noisy = 0.5 * kept.square().mean().sqrt() * torch.randn(p.shape, generator=generator)
        p.copy_(kept + noisy)
        gap = np.abs(velocity() - expected).max()
        p.copy_(kept)
        unseen += [name] if gap < 1e-4 else []
    assert unseen == ["conv.bias"], "a constant, which AlignNet's LayerNorm takes away again"


def rewritten(bundle, folder, change):
    """A copy of the bundle whose adapter file has been changed."""
    shutil.copytree(bundle, folder)
    tensors = load_file(folder / "lora.safetensors")
    change(tensors)
    save_file(tensors, folder / "lora.safetensors")
    return str(folder)


def test_files_that_do_not_fit_are_refused_with_every_reason(pipe, bundle, tmp_path):
    gone = "transformer_blocks.0.attn.processor.q_moe_lora.gate.weight"
    bent = "single_transformer_blocks.1.attn.processor.k_moe_lora.experts.0.up.weight"

    def change(tensors):
        del tensors[gone]
        tensors[bent] = tensors[bent][:, :-1].contiguous()
        tensors["extra"] = torch.ones(1)

    folder = rewritten(bundle, tmp_path / "bad", change)
    with pytest.raises(ValueError) as e:
        module_of(pipe).load(folder)
    assert f"lora: {gone} is absent, expected (4, 256)" in str(e.value)
    assert "lora: extra is (1,), expected absent" in str(e.value)
    assert f"lora: {bent} is (128, 15), expected (128, 16)" in str(e.value)


def test_an_adapter_of_another_flux_is_refused_and_the_base_stays_as_it_was(pipe, bundle):
    module = module_of(pipe)
    flux = diffusers.FluxTransformer2DModel.from_pretrained(FLUX / "transformer")
    names = set(flux.state_dict())
    _, adapter, _ = module.load(bundle)
    module.apply(flux, adapter)
    assert set(flux.state_dict()) > names
    module.remove(flux)
    assert set(flux.state_dict()) == names and "forward" not in vars(flux)
    del flux.transformer_blocks[2]
    with pytest.raises(ValueError, match=r"this FLUX has .* \(2, 6, 128\)"):
        module.apply(flux, adapter)


def test_ordinary_loras_go_beside_it(pipe, ours, tmp_path):
    without = edit(pipe, ours)[0]
    file = store(tmp_path / "lora.safetensors", lora_file("lora-peft", flux=FLUX_TINY))
    pipe.load_lora_weights(str(file), adapter_name="other")
    beside = edit(pipe, ours)[0]
    pipe.unload_lora_weights()
    assert np.abs(beside - without).max() > 0.05
    np.testing.assert_allclose(edit(pipe, ours)[0], without, atol=1e-5)


def test_it_loads_from_its_own_folder(pipe, ours, bundle, qwen):
    parts = {n: getattr(pipe, n) for n in ("vae", "scheduler")}
    flux = diffusers.FluxTransformer2DModel.from_pretrained(FLUX / "transformer")
    own = diffusers.DiffusionPipeline.from_pretrained(
        str(bundle), adapter=str(bundle), trust_remote_code=True, transformer=flux, **parts, **qwen
    )
    own.set_progress_bar_config(disable=True)
    assert np.abs(edit(own, ours)[0] - ours.steps).max() < 1e-3


def test_the_readme_runs_and_both_ways_to_load_give_the_same(bundle, qwen, tmp_path, monkeypatch):
    text = (bundle / "README.md").read_text()
    first, second = re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, flags=re.MULTILINE)
    for line in re.findall(
        r"^    (pipe.*\n(?:    .*\n)*?    \))", SHARING.read_text(), re.MULTILINE
    ):
        assert line.replace('"OUT"', "FOLDER") in text, "docs/sharing.md says otherwise"
    for part in qwen.values():
        part.save_pretrained(tmp_path / "qwen")
    names = {"FLUX": str(FLUX), "QWEN": str(tmp_path / "qwen"), "FOLDER": str(bundle)}
    first, count = re.subn("FLUX, QWEN, FOLDER = .*", "", textwrap.dedent(first))
    first = first.replace("cpu_offload()", "cpu_offload(device='cpu')")
    assert count == first.count("device=") == 1
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(bundle)
    picture().save("in.png")
    exec(first, names)
    with Image.open("out.png") as out:
        assert out.size == (64, 64)
    one = names["pipe"]
    one.remove_all_hooks()
    exec(textwrap.dedent(second), names)
    assert names["pipe"] is not one
    call = {"image": picture(), "num_inference_steps": 1, "output_type": "latent"}
    latents = [
        p(PROMPT, **call, generator=torch.Generator().manual_seed(0)).images
        for p in (one, names["pipe"])
    ]
    assert torch.equal(*latents) and latents[0].isfinite().all()


OTHERS = [f for f in os.environ.get("X2JAX_DIFFUSERS", "").split(os.pathsep) if f]
"""Folders with other versions of diffusers, transformers and peft; see docs/sharing.md."""


@pytest.mark.slow
@pytest.mark.parametrize("versions", ["installed", *OTHERS])
def test_every_version_of_diffusers_draws_the_same(versions, pipe, ours, bundle, tmp_path):
    source = module_of(pipe).unpack(torch.tensor(ours.source), 8, 8)
    case = {"noise": torch.tensor(ours.noise), "source": source}
    save_file(
        case, tmp_path / "case.safetensors", {"call": json.dumps({"prompt": PROMPT, "task": TASK})}
    )
    store(tmp_path / "lora.safetensors", lora_file("lora-peft", flux=FLUX_TINY))
    for name, at in {"bundle": bundle, "base": FLUX, "qwen": TINY / "qwen"}.items():
        (tmp_path / name).symlink_to(at)
    script, log = Path(__file__).with_name("run_bundle.py"), tmp_path / "log"
    environment = os.environ | (
        {} if versions == "installed" else {"PYTHONPATH": str(Path(versions).resolve())}
    )
    with log.open("w") as f:
        done = subprocess.run(
            [sys.executable, script, tmp_path], env=environment, stdout=f, stderr=f
        )
    assert done.returncode == 0, log.read_text()
    with safe_open(tmp_path / "result.safetensors", "pt") as f:
        found = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        used = Path(f.metadata()["at"])
    if versions != "installed":
        assert used.is_relative_to(Path(versions).resolve()), f"{used} was run instead"
    for name in ("alone", "after"):
        np.testing.assert_allclose(found[name].numpy(), ours.steps[-1], atol=1e-3, err_msg=name)
    pipe.load_lora_weights(str(tmp_path / "lora.safetensors"), adapter_name="other")
    beside = edit(pipe, ours)[0][-1]
    pipe.unload_lora_weights()
    assert np.abs(beside - ours.steps[-1]).max() > 0.05
    np.testing.assert_allclose(found["beside"].numpy(), beside, atol=1e-3)


def test_it_encodes_the_source_and_repeats_itself(pipe):
    kw = {"image": picture(), "task": TASK, "output_type": "latent"}
    a, b, c = (
        pipe(PROMPT, **kw, generator=torch.Generator().manual_seed(s)).images for s in (0, 0, 1)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)
    with pytest.raises(ValueError, match="unknown task 'dance'"):
        pipe(PROMPT, picture(), task="dance")


def test_a_bundle_is_an_x2edit_adapter_too(bundle, params, tmp_path):
    assert cli.main(["import", "--from", str(bundle), "--out", str(tmp_path / "ours")]) == 0
    back = open_trained(tmp_path / "ours").params
    assert back.keys() == params.keys()
    for path, x in params.items():
        np.testing.assert_array_equal(back[path], x, err_msg=path)
