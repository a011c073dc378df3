"""States at left pads, which AlignNet reads and FLUX attends to: as X2I and X2Edit had them.

They ran transformers 4.49 and 4.51 with sdpa on CUDA, whose mask went through `_unmask_unattended`;
transformers 5 still has that function, and takes a finished mask.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.modeling_attn_mask_utils import AttentionMaskConverter

from converters.alignnet import alignnet_table
from tests import parity
from tests.encoders import test_qwen2_5_vl as text
from tests.encoders import test_qwen_vision as seeing
from tests.test_alignnet import Reference
from x2jax.alignnet import AlignNet, AlignNetConfig
from x2jax.encoders.qwen2_5_vl import QWEN_TINY, QwenConfig, mrope_positions, pack

LENGTH, PADS = 512, (461, 430)
reference, ours = seeing.reference, seeing.ours  # fixtures


def released_mask(mask):
    """What transformers 4.51 gave to sdpa on CUDA, as booleans."""
    low = torch.finfo(torch.float32).min
    length = mask.shape[1]
    seen = torch.tensor(np.tril(np.ones((length, length), bool)) & mask[:, None])
    added = torch.where(seen, 0.0, low)[:, None]
    return AttentionMaskConverter._unmask_unattended(added, low) == 0


def released(model, ids, mask, positions=None, **more):
    """All hidden states; text has the positions that 4.51 counted, 1 at pads."""
    if positions is None:
        positions = np.where(mask, mask.cumsum(1) - 1, 1)[..., None].repeat(3, -1)
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(ids),
            attention_mask=released_mask(mask),
            position_ids=torch.tensor(positions).permute(2, 0, 1),
            output_hidden_states=True,
            **more,
        )
    return [x.numpy() for x in out.hidden_states]


@pytest.fixture(scope="module")
def prompts():
    ids = np.random.default_rng(0).integers(1, 40, (2, LENGTH))
    mask = np.arange(LENGTH) >= np.array(PADS)[:, None]
    return np.where(mask, ids, 0), mask


def test_every_state_at_all_512_positions_and_what_alignnet_makes_of_them(prompts):
    ids, mask = prompts
    model = text.reference(text.SMALL)
    mllm: Any = text.build(text.SMALL, model)
    cfg = AlignNetConfig(text.SMALL.states, text.SMALL.width, text_width=20, pooled_width=6)
    bridge = parity.randomise(Reference(cfg))

    def make():
        return AlignNet(cfg, **seeing.F32, rngs=nnx.Rngs(0))

    alignnet: Any = parity.fill(
        make, alignnet_table(cfg.states, cfg.mixing), parity.tensors(bridge)
    )

    @jax.jit
    def run(mllm):
        inputs = (jnp.asarray(ids), jnp.asarray(mask))
        return [*mllm.hidden_states(*inputs), *alignnet.condition(mllm, *inputs)]

    def expected(ids=ids, positions=None):
        states = released(model, ids, mask, positions)
        with torch.no_grad():
            out = bridge(torch.tensor(np.stack(states, axis=1)))
        return [*states, *(x.numpy() for x in out)]

    found = [np.asarray(x) for x in run(mllm)]
    parity.assert_parity(found, expected(), tol=1e-4)
    # Pads are equal among themselves, and say what the text is: its last token changes them.
    assert np.ptp(found[1][0, : PADS[0]], axis=0).max() < 1e-5
    other = np.where(np.arange(LENGTH) == LENGTH - 1, ids % 39 + 1, ids)
    pads = [x[:, 0] for x in found[1:3]]
    assert parity.distance(pads, [x[:, 0] for x in expected(other)[1:3]]) > 1e-3
    # Parity would notice other positions of pads, and pads that see themselves alone.
    zero = np.where(mask, mask.cumsum(1) - 1, 0)[..., None].repeat(3, -1)
    assert parity.distance(found, expected(positions=zero)) > 1e-2
    mllm.cfg = dataclasses.replace(text.SMALL, pad_attention="self")
    assert parity.distance([np.asarray(x) for x in run(mllm)], expected()) > 0.1


def test_every_weight_matters_at_pads():
    mask = text.mask_of([3, 1])
    model = text.reference(text.SMALL)
    mllm: Any = text.build(text.SMALL, model)
    states = mllm.hidden_states(jnp.asarray(text.IDS), jnp.asarray(mask))
    exempt = {
        r"model\.visual\..*": "the vision tower sees no image here",
        r"lm_head\.weight": "states alone",
    }

    def run():
        return [x[~mask] for x in released(model, text.IDS, mask)]

    mine = [np.asarray(x)[~mask] for x in states]
    parity.assert_every_weight_matters(model, run, mine, exempt=exempt)


def test_with_images_and_videos(reference, ours):
    batch = seeing.CASES["a batch"]
    ids, mask = seeing.prompt(batch)
    assert not mask.all(1).any()
    positions, _ = mrope_positions(ids, mask, batch, seeing.VISION)
    more = seeing.reference_inputs(batch)
    expected, _ = reference.model.get_rope_index(**more)
    expected = expected.permute(1, 2, 0).numpy()
    expected[~mask] = 1  # get_rope_index of 4.51 began with ones, that of 5 with zeros
    for name in ("input_ids", "attention_mask"):
        more.pop(name)
    more |= dict(
        pixel_values=seeing.all_patches(batch, "image"),
        pixel_values_videos=seeing.all_patches(batch, "video"),
    )
    vision = pack(batch, seeing.VISION, seeing.BUDGET)
    *states, _ = seeing.states_and_logits(ours, ids, mask, positions, vision)
    parity.assert_parity(states, released(reference, ids, mask, expected, **more), tol=1e-4)


def test_the_choice_is_in_config_json():
    assert "pad_attention" not in text.SMALL.to_transformers()
    flat = {"model_type": "qwen2_5_vl", **QWEN_TINY.to_transformers()}
    assert QwenConfig.from_transformers(flat) == QWEN_TINY
    assert QWEN_TINY.pad_attention == "self"
    with pytest.raises(ValueError, match="unknown pad_attention 'none': use 'all' or 'self'"):
        QwenConfig.from_transformers(flat | {"pad_attention": "none"})
