"""Generation: token for token with transformers, and drawing by its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from tests import parity
from tests.encoders import test_qwen_vision as seeing
from x2jax.encoders.generate import GREEDY, Sampling, draw, generate, restrict
from x2jax.encoders.qwen2_5_vl import mrope_positions, pack

COUNT, PAD = 64, 1
NEVER = np.array([-1])
CASES = {
    "text, padded": [[], []],
    "one image": [[seeing.image(24, 40)]],
    "a batch of video, images and text": seeing.CASES["a batch"],
}
reference, ours = seeing.reference, seeing.ours  # fixtures


def prompt(case):
    """Ids, mask, and the prompt's other arguments of `generate`."""
    batch = CASES[case]
    ids, mask = seeing.prompt(batch)
    if case.startswith("text"):
        mask[0, :2] = False
        return ids, mask, {}
    positions, deltas = mrope_positions(ids, mask, batch, seeing.VISION)
    seen = pack(batch, seeing.VISION, seeing.BUDGET)
    return ids, mask, dict(positions_BT3=positions, deltas_B=deltas, vision=seen)


@jax.jit(static_argnames=("count", "keep_states"))
def run(model, ids, mask, eos=NEVER, sampling=GREEDY, key=None, count=COUNT, **kw):
    return generate(
        model, ids, mask, eos=eos, count=count, pad=PAD, sampling=sampling, key=key, **kw
    )


def inputs(case, ids, mask):
    """What transformers takes."""
    batch = CASES[case]
    found = seeing.reference_inputs(batch) | dict(
        pixel_values=seeing.all_patches(batch, "image"),
        pixel_values_videos=seeing.all_patches(batch, "video"),
    )
    kinds = np.where(ids == seeing.IMAGE, 1, np.where(ids == seeing.VIDEO, 2, 0))
    found |= dict(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(mask, dtype=torch.long),
        mm_token_type_ids=torch.tensor(kinds),
    )
    return {name: x for name, x in found.items() if x is not None}


def reference_tokens(model, case, eos=None):
    ids, mask, _ = prompt(case)
    with torch.no_grad():
        out = model.generate(
            **inputs(case, ids, mask),
            max_new_tokens=COUNT, do_sample=False, eos_token_id=eos, pad_token_id=PAD,
        )  # fmt: skip
    return out[:, ids.shape[1] :].numpy()


@pytest.mark.parametrize("case", [c for c in CASES if c != "one image"])
def test_greedy_tokens_equal_transformers(case, reference, ours):
    ids, mask, rest = prompt(case)
    found = run(ours, ids, mask, keep_states=False, **rest)
    np.testing.assert_array_equal(found.tokens_BG, reference_tokens(reference, case))
    np.testing.assert_array_equal(found.lengths_B, [COUNT] * len(ids))
    assert found.states_NBGD is None
    assert len(np.unique(found.tokens_BG)) > 3, "a constant answer proves little"


def test_tokens_states_and_logits_after_an_image_equal_transformers(reference, ours):
    """The cached pass against one pass over prompt and answer, for every weight."""
    case = "one image"
    ids, mask, rest = prompt(case)
    found = run(ours, ids, mask, **rest)
    np.testing.assert_array_equal(found.tokens_BG, reference_tokens(reference, case))
    states = np.asarray(found.states_NBGD)
    mine = [*states, np.asarray(ours.logits(jnp.asarray(states[-1])))]
    whole = np.concatenate([ids, found.tokens_BG], axis=1)
    seen = np.concatenate([mask, np.ones((1, COUNT), bool)], axis=1)
    # A generated image token must not ask for pictures of its own.
    assert not np.isin(found.tokens_BG, [seeing.IMAGE, seeing.VIDEO]).any()

    def teacher_forced():
        with torch.no_grad():
            out = reference(**inputs(case, whole, seen), output_hidden_states=True)
        return [x.numpy()[:, ids.shape[1] :] for x in (*out.hidden_states, out.logits)]

    parity.assert_every_weight_matters(reference, teacher_forced, mine, tol=2e-5)


def test_a_sample_ends_at_its_end_token(reference, ours):
    case = "text, padded"
    ids, mask, _ = prompt(case)
    free = np.asarray(run(ours, ids, mask, keep_states=False).tokens_BG)[:, :40]

    def ends(eos):
        """Where both rows would end; as late as possible, and not together."""
        first, second = (np.flatnonzero(np.isin(row, eos))[0] for row in free)
        return first != second, min(first, second)

    eos = max(((int(a), int(b)) for a in free[0] for b in free[1]), key=ends)
    found = run(ours, ids, mask, np.array(eos))
    tokens, lengths = np.asarray(found.tokens_BG), np.asarray(found.lengths_B)
    expected = reference_tokens(reference, case, list(eos))
    assert len(set(lengths)) == 2 and lengths.max() < COUNT and expected.shape[1] == lengths.max()
    np.testing.assert_array_equal(tokens[:, : lengths.max()], expected)
    by_row = np.moveaxis(np.asarray(found.states_NBGD), 1, 0)
    for row, length, states in zip(tokens, lengths, by_row, strict=True):
        assert row[length - 1] in eos and not np.isin(row[: length - 1], eos).any()
        assert (row[length:] == PAD).all() and not states[:, length:].any()
        assert np.abs(states[:, :length]).max(axis=(0, 2)).min() > 0


GRID = [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.6), (0.9, 9, 0.8), (1.0, 100, 1e-6), (2.0, 1, 0.9)]


@pytest.mark.parametrize(("temperature", "k", "p"), GRID)
def test_the_distribution_equals_transformers(temperature, k, p):
    logits = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32) * 2
    expected = torch.tensor(logits) / temperature
    if k:
        expected = TopKLogitsWarper(k)(None, expected)
    expected = TopPLogitsWarper(p)(None, expected) if p < 1 else expected
    mine = restrict(jnp.asarray(logits), Sampling(temperature, k, p))
    np.testing.assert_array_equal(np.isfinite(mine), np.isfinite(expected))
    np.testing.assert_allclose(
        jax.nn.softmax(mine), torch.softmax(expected, -1).numpy(), rtol=1e-5, atol=1e-7
    )


def test_tokens_are_drawn_from_that_distribution():
    rows, sampling = 20_000, Sampling(1.5, 6, 0.9)
    logits = jnp.asarray(np.random.default_rng(1).normal(size=12).astype(np.float32))
    p = np.asarray(jax.nn.softmax(restrict(logits[None], sampling)))[0]
    drawn = draw(jnp.tile(logits, (rows, 1)), sampling, jax.random.key(0), 3)
    share = np.bincount(drawn, minlength=12) / rows
    assert not share[p == 0].any() and (p == 0).sum() >= 6
    # Four standard deviations of each share.
    assert (np.abs(share - p) <= 4 * np.sqrt(p * (1 - p) / rows)).all()
    # Rows and steps have numbers of their own.
    assert (draw(jnp.tile(logits, (rows, 1)), sampling, jax.random.key(0), 4) != drawn).mean() > 0.3


def test_sampling_is_reproducible_and_greedy_at_zero(ours):
    ids, mask, _ = prompt("text, padded")
    short = dict(count=16, keep_states=False)
    greedy = np.asarray(run(ours, ids, mask, **short).tokens_BG)
    before = run._cache_size()

    def tokens(seed, *sampling, rows=slice(None)):
        out = run(
            ours, ids[rows], mask[rows], sampling=Sampling(*map(np.float32, sampling)),
            key=jax.random.key(seed), **short,
        )  # fmt: skip
        return np.asarray(out.tokens_BG)

    np.testing.assert_array_equal(tokens(0, 0.0, 0, 1.0), greedy)
    np.testing.assert_array_equal(tokens(0, 1.0, 1, 1.0), greedy)
    np.testing.assert_array_equal(tokens(0, 1.0, 0, 1e-6), greedy)
    first = tokens(7, 1.0, 0, 1.0)
    np.testing.assert_array_equal(first, tokens(7, 1.0, 0, 1.0))
    assert (first != tokens(8, 1.0, 0, 1.0)).any(axis=1).all() and (first != greedy).any()
    assert run._cache_size() == before + 1, "settings and seeds are data of one program"
    np.testing.assert_array_equal(tokens(7, 1.0, 0, 1.0, rows=slice(0, 1)), first[:1])


def test_wrong_requests_say_what_to_do(ours):
    ids, mask, rest = prompt("one image")
    with pytest.raises(ValueError, match="count=0: generate at least one token"):
        generate(ours, ids, mask, count=0, eos=())
    with pytest.raises(ValueError, match="give positions_BT3 and deltas_B together"):
        generate(ours, ids, mask, count=1, eos=(), positions_BT3=rest["positions_BT3"])
    with pytest.raises(ValueError, match="sampling needs a key: jax"):
        generate(ours, ids, mask, count=1, eos=(), sampling=Sampling(1.0))
    with pytest.raises(ValueError, match=r"temperature=-1 must be at least 0; top_k=0.5 must be a"):
        Sampling(-1, 0.5)
    for p in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="must be above 0 and at most 1"):
            Sampling(1, top_p=p)
