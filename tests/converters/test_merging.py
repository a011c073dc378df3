"""A LoRA goes into the base that it was trained on: its fingerprint, in every form of both."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.lora import get_config
from converters import __main__ as cli
from converters import lora_peft
from converters.load import open_weights
from tests.converters.loras import lora_file, store
from tests.converters.test_x2edit import make_run
from x2jax.adapters import AdapterConfig
from x2jax.flux import FLUX_TINY
from x2jax.recipes import recipe_class
from x2jax.recipes.base import Recipe
from x2jax.sources import TINY
from x2jax.trees import fingerprint, fingerprint_of, spaced_out

BASE = TINY / "flux" / "transformer"
NAME = "diffusion_pytorch_model.safetensors"
PLAIN = AdapterConfig(
    experts=0, tasks=0, rank=2, alpha=2.0, double=("img_attn/q",), single=("attn/v",), series=()
)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def made(request, tmp_path_factory):
    """A LoRA, as run, file and import, with the fingerprints of a training run's own loader."""
    root = tmp_path_factory.mktemp("merging")
    config = get_config().unlock()
    config.precision.frozen = request.param
    recipe = recipe_class("lora").open(config)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    frozen = recipe.load_frozen(dict.fromkeys(recipe.skeleton.paths, here))
    prints = Recipe.fingerprints(recipe, frozen)
    shapes = {
        f"adapter/{kind}_blocks/{name}/{leaf}": (count, *shape)
        for kind, name, count in (("double", "img_attn/q", 3), ("single", "attn/v", 6))
        for leaf, shape in (("down", (128, 1, 2)), ("up", (1, 2, 128)))
    }
    params = {p: np.ones(s, np.float32) for p, s in shapes.items()}
    make_run(root / "run", params, PLAIN, prints)
    assert cli.main(["export", "--from", str(root / "run"), "--out", str(root / "file")]) == 0
    command = ["import", "--from", str(root / "file" / lora_peft.FILE), "--flux", "tiny"]
    assert cli.main([*command, "--out", str(root / "ours")]) == 0
    command = ["export", "--from", str(BASE), "--format", "flux-bfl", "--out", str(root / "bfl")]
    assert cli.main(command) == 0
    assert cli.main(["import", "--from", str(BASE), "--out", str(root / "native")]) == 0
    return root


def merge(base, lora, out, *options) -> int:
    command = ["export", "--from", str(base), "--merge", str(lora), "--out", str(out), *options]
    return cli.main(command)


def test_every_form_of_a_lora_knows_every_form_of_its_base(made, tmp_path, capsys):
    assert FLUX_TINY.double_blocks == 3
    pairs = [(lora, BASE) for lora in ("run", "file", "ours")]
    pairs += [("run", made / "bfl"), ("run", made / "native")]
    for i, (lora, base) in enumerate(pairs):
        assert merge(base, made / lora, tmp_path / str(i)) == 0
        assert "warning" not in capsys.readouterr().out
    assert cli.main(["export", "--from", str(made / "ours"), "--out", str(tmp_path / "re")]) == 0
    again, file = (
        open_weights(p / lora_peft.FILE).metadata for p in (tmp_path / "re", made / "file")
    )
    assert json.loads(again["fingerprints"]) == json.loads(file["fingerprints"])


@pytest.mark.parametrize("lora", ["run", "file", "ours"])
def test_another_base_is_refused_unless_asked_for(made, lora, tmp_path, capsys):
    tensors = {n: np.array(x) for n, x in open_weights(BASE).items()}
    tensors["single_transformer_blocks.5.attn.to_v.weight"] *= 1.125  # one tensor, fine-tuned
    other = shutil.copytree(BASE, tmp_path / "other")
    store(other / NAME, tensors)
    assert merge(other, made / lora, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "was trained on another base: its fingerprint is " in error and "--any-base" in error
    assert not (tmp_path / "out").exists()
    assert merge(other, made / lora, tmp_path / "out", "--any-base") == 0
    assert "warning" in capsys.readouterr().out
    assert merge(BASE, tmp_path / "nothing", tmp_path / "none") == 1


def test_a_lora_of_others_cannot_be_checked_and_a_damaged_one_is_refused(tmp_path, capsys):
    tensors = lora_file("lora-peft", flux=FLUX_TINY)
    theirs = store(tmp_path / "a.safetensors", tensors, {"fingerprints": "theirs"})
    assert merge(BASE, theirs, tmp_path / "out") == 0
    assert "warning" in (out := capsys.readouterr().out) and "cannot be checked" in out
    header = {"software": "x2jax", "fingerprints": '{"flux": 3}'}
    bad = store(tmp_path / "b.safetensors", tensors, header)
    assert merge(BASE, bad, tmp_path / "none") == 1
    assert "fingerprints in its header are damaged" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_fingerprint_of_spaced_values_is_that_of_the_arrays():
    rng = np.random.default_rng(0)
    params = {f"p{i}": rng.standard_normal(s) for i, s in enumerate([(), (3,), (70, 50), (9, 999)])}
    spaced = {p: (x.shape, x.reshape(-1)[list(spaced_out(x.size))]) for p, x in params.items()}
    assert fingerprint_of(spaced) == fingerprint(params)
    assert fingerprint({p: jnp.asarray(x) for p, x in params.items()}) == fingerprint(params)
    params["p3"][0, 0] += 1
    assert fingerprint_of(spaced) != fingerprint(params)
    assert len(spaced_out(9 * 999)) == 1024 and len(spaced_out(1023)) == 1023
