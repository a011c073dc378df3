"""Qwen3 against transformers: every state, logits, generation, sizes, files both ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import Qwen3Config as TheirConfig
from transformers import Qwen3ForCausalLM

from converters.__main__ import main
from converters.formats import FORMATS, detect
from converters.qwen3 import qwen3_table
from converters.rules import plan
from tests import parity
from x2jax.encoders.generate import generate
from x2jax.encoders.qwen3 import QWEN3_8B, Qwen3, Qwen3Config
from x2jax.sharding import make_mesh, param_shardings
from x2jax.trees import prefixed, state_params

# The heads do not fill the width, as in the 0.6B.
SMALL = Qwen3Config(2, 24, 4, 2, 16, 48, 40, False)
IDS = np.random.default_rng(0).integers(0, 40, (2, 9))
MASK = np.arange(9)[None] >= np.array([3, 0])[:, None]
F32 = dict(dtype=jnp.float32, param_dtype=jnp.float32)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def pair(request):
    cfg = Qwen3Config(2, 24, 4, 2, 16, 48, 40, request.param)
    model = parity.randomise(Qwen3ForCausalLM(TheirConfig(**cfg.to_transformers())))
    source = parity.tensors(model)
    if cfg.tied:
        source.pop("lm_head.weight")
    ours = parity.fill(lambda: Qwen3(cfg, **F32, rngs=nnx.Rngs(0)), qwen3_table(cfg), source)
    return model, ours


def test_every_hidden_state_and_the_logits_equal_transformers(pair):
    model, ours = pair

    def run():
        with torch.no_grad():
            out = model(
                input_ids=torch.tensor(IDS),
                attention_mask=torch.tensor(MASK, dtype=torch.long),
                output_hidden_states=True,
            )
        return [x.numpy()[MASK] for x in (*out.hidden_states, out.logits)]

    states = jax.jit(lambda m: m.hidden_states(jnp.asarray(IDS), jnp.asarray(MASK)))(ours)
    mine = [np.asarray(x)[MASK] for x in (*states, ours.logits(states[-1]))]
    parity.assert_every_weight_matters(model, run, mine, tol=1e-5)


@pytest.mark.parametrize("pair", [False], ids=["untied"], indirect=True)
def test_greedy_tokens_equal_transformers(pair):
    model, ours = pair
    found = jax.jit(lambda m: generate(m, jnp.asarray(IDS), jnp.asarray(MASK), count=64, eos=()))(
        ours
    )
    with torch.no_grad():
        expected = model.generate(
            input_ids=torch.tensor(IDS),
            attention_mask=torch.tensor(MASK, dtype=torch.long),
            max_new_tokens=64, do_sample=False, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
    np.testing.assert_array_equal(found.tokens_BG, expected[:, 9:].numpy())
    assert len(np.unique(found.tokens_BG)) > 3, "a constant answer proves little"
    # What was read token by token is what one pass over all of it reads.
    whole = jnp.concatenate([jnp.asarray(IDS), found.tokens_BG], axis=1)
    mask = jnp.pad(jnp.asarray(MASK), ((0, 0), (0, 64)), constant_values=True)
    np.testing.assert_allclose(
        found.states_NBGD, ours.hidden_states(whole, mask)[:, :, 9:], atol=2e-5
    )


def test_the_8b_has_the_parameters_of_transformers():
    with torch.device("meta"):
        model = Qwen3ForCausalLM(TheirConfig(**QWEN3_8B.to_transformers()))
    theirs = {name: tuple(p.shape) for name, p in model.named_parameters()}
    skeleton = nnx.eval_shape(
        lambda: Qwen3(QWEN3_8B, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    )
    shapes = {path: x.shape for path, x in state_params(skeleton).items()}
    found = plan(qwen3_table(QWEN3_8B), shapes, theirs)
    assert set(found.entries) == set(theirs) and not found.ignored
    count = sum(int(np.prod(s)) for s in shapes.values())
    assert count == sum(p.numel() for p in model.parameters()) == 8_190_735_360
    mesh = make_mesh({"fsdp": 2, "tensor": 2})
    places = param_shardings(prefixed(state_params(skeleton), "mllm"), mesh)
    assert all("fsdp" in x.spec for p, x in places.items() if p.endswith("kernel"))


def test_a_folder_is_known_and_goes_both_ways(tmp_path, pair):
    model, _ = pair
    model.save_pretrained(tmp_path / "theirs")
    assert detect(tmp_path / "theirs") is FORMATS["qwen3"]
    assert (
        main(["import", "--from", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")]) == 0
    )
    assert main(["export", "--from", str(tmp_path / "ours"), "--out", str(tmp_path / "back")]) == 0
    again = Qwen3ForCausalLM.from_pretrained(tmp_path / "back")
    for name, x in model.state_dict().items():
        np.testing.assert_array_equal(x, again.state_dict()[name], err_msg=name)


def test_configs_survive_the_round_trip():
    for cfg in (SMALL, QWEN3_8B):
        assert Qwen3Config.from_transformers(TheirConfig(**cfg.to_transformers()).to_dict()) == cfg
    # As published, by transformers 4.
    flat = {k: v for k, v in QWEN3_8B.to_transformers().items() if k != "rope_parameters"}
    flat |= dict(rope_theta=1000000, rope_scaling=None, attention_bias=False, hidden_act="silu")
    assert Qwen3Config.from_transformers(flat) == QWEN3_8B
    wrong = flat | dict(attention_bias=True, use_sliding_window=True, hidden_act="gelu")
    wrong["rope_scaling"] = {"rope_type": "yarn", "factor": 4.0}
    with pytest.raises(
        ValueError, match=r"attention_bias, use_sliding_window, .* type 'yarn', activation 'gelu'"
    ):
        Qwen3Config.from_transformers(wrong)
    with pytest.raises(ValueError, match="expected the config of a qwen3 model, found 'qwen2'"):
        Qwen3Config.from_transformers({"model_type": "qwen2"})
    with pytest.raises(ValueError, match="lacks 'num_hidden_layers'"):
        Qwen3Config.from_transformers({"model_type": "qwen3"})
    with pytest.raises(ValueError, match="must be a multiple of kv heads"):
        Qwen3Config(2, 24, 4, 3, 16, 48, 40, False)
