"""Qwen2.5-VL's text path against transformers: every hidden state, padded and not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from converters.qwen2_5_vl import qwen_table
from tests import parity
from x2jax.encoders.qwen2_5_vl import (
    QWEN2_5_VL_3B,
    QWEN2_5_VL_7B,
    QWEN_TINY,
    Qwen2_5_VL,
    QwenConfig,
)

SMALL = QwenConfig(2, 32, 4, 2, 48, 40, False, (1, 1, 2))
IDS = np.random.default_rng(0).integers(0, 40, (2, 9))
MASKS = {"unpadded": [0, 0], "padded": [3, 0]}


def reference(cfg):
    vision = dict(depth=1, hidden_size=16, num_heads=2, intermediate_size=16, out_hidden_size=32)
    config = Qwen2_5_VLConfig(text_config=cfg.to_transformers(), vision_config=vision)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = cfg.tied
    return parity.randomise(Qwen2_5_VLForConditionalGeneration(config))


def text_tensors(model):
    keep = ("model.language_model.", "lm_head.")
    return {k: v for k, v in parity.tensors(model).items() if k.startswith(keep)}


def build(cfg, model):
    def make():
        return Qwen2_5_VL(cfg, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))

    source = text_tensors(model)
    if cfg.tied:
        source.pop("lm_head.weight")
    return parity.fill(make, qwen_table(cfg, nested=True), source)


def mask_of(pads):
    return np.arange(9)[None] >= np.array(pads)[:, None]


def run_reference(model, mask):
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(IDS),
            attention_mask=torch.tensor(mask, dtype=torch.long),
            output_hidden_states=True,
        )
    return [*out.hidden_states, out.logits]


def only_valid(arrays, mask):
    return [np.asarray(a)[mask] for a in arrays]


@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("tied", [False, True])
def test_every_hidden_state_and_the_logits_equal_transformers(case, tied):
    cfg, mask = dataclasses.replace(SMALL, tied=tied), mask_of(MASKS[case])
    model = reference(cfg)
    ours = build(cfg, model)
    states = jax.jit(lambda m: m.hidden_states(jnp.asarray(IDS), jnp.asarray(mask)))(ours)
    assert len(states) == cfg.states
    mine = only_valid([*states, ours.logits(states[-1])], mask)
    exempt = {r"model\.visual\..*": "the vision tower sees no image here"}
    parity.assert_every_weight_matters(
        model, lambda: only_valid(run_reference(model, mask), mask), mine, tol=1e-5, exempt=exempt
    )


def test_pads_do_not_reach_tokens():
    model = reference(SMALL)
    ours, mask = build(SMALL, model), jnp.asarray(mask_of([3, 3]))
    a = ours.hidden_states(jnp.asarray(IDS), mask)
    b = ours.hidden_states(jnp.asarray(IDS).at[:, :3].set(7), mask)
    np.testing.assert_array_equal(a[:, :, 3:], b[:, :, 3:])
    short = ours.hidden_states(jnp.asarray(IDS[:, 3:]), mask[:, 3:])
    np.testing.assert_allclose(a[:, :, 3:], short, atol=1e-5)
    assert np.isfinite(a).all()


@pytest.mark.parametrize(
    ("cfg", "count"), [(QWEN2_5_VL_7B, 7_615_616_512), (QWEN2_5_VL_3B, 3_085_938_688)]
)
def test_full_size_counts(cfg, count):
    """Counts of Qwen2.5-7B and 3B, whose architecture the text path has (7B untied)."""
    state = nnx.state(
        nnx.eval_shape(
            lambda: Qwen2_5_VL(cfg, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        )
    )
    assert sum(x.size for x in jax.tree.leaves(state)) == count


def test_configs_survive_the_round_trip():
    for cfg in (SMALL, QWEN_TINY, QWEN2_5_VL_7B):
        config = Qwen2_5_VLConfig(text_config=cfg.to_transformers()).to_dict()
        config["tie_word_embeddings"] = cfg.tied
        assert QwenConfig.from_transformers(config) == cfg
    with pytest.raises(ValueError, match="found 'llama'"):
        QwenConfig.from_transformers({"model_type": "llama"})
    # As published, by transformers 4: flat.
    flat = {k: v for k, v in QWEN2_5_VL_7B.to_transformers().items() if k != "rope_parameters"}
    flat |= dict(model_type="qwen2_5_vl", rope_theta=1000000.0, use_sliding_window=False)
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": [16, 24, 24]}
    assert QwenConfig.from_transformers(flat) == QWEN2_5_VL_7B
    wrong = flat | dict(use_sliding_window=True, hidden_act="gelu")
    wrong["rope_scaling"] = {"type": "yarn", "factor": 4.0, "mrope_section": [16, 24, 24]}
    with pytest.raises(ValueError, match=r"type 'yarn', use_sliding_window, activation 'gelu'"):
        QwenConfig.from_transformers(wrong)
