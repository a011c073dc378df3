"""The distillation loss against the formula, written in PyTorch with hooks on diffusers' FLUX."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests import parity
from tests.flux.test_parity import SMALL, TEXT, build, inputs, reference
from x2jax import distill
from x2jax.flux import PAD, TARGET, ImageStream

CFG = dataclasses.replace(SMALL, double_blocks=2, single_blocks=3)
UNSEEN = {
    r"norm_out\..*|proj_out\..*": "no term comes after the last attention",
    r"single_transformer_blocks\.2\.(proj_mlp|proj_out)\..*": "after the last attention",
}


def conditions(seed, batch=2):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return normal(batch, TEXT, CFG.text_width), normal(batch, CFG.pooled_width)


def by_the_formula(x, temperature=3.0):
    """p = softmax(n(x) / temperature)."""
    n = (x - x.mean(-1, keepdim=True)) / (1e-7 + x.std(-1, keepdim=True))
    return torch.softmax(n / temperature, dim=-1)


def taps(model, x, txt, pooled):
    """Attention outputs of every block, caught by hooks: 2 a double block, 1 a single block."""
    double, single = [], []
    hooks = [
        b.attn.register_forward_hook(lambda m, i, out: double.append(out))
        for b in model.transformer_blocks
    ]
    hooks += [
        b.attn.register_forward_hook(lambda m, i, out: single.append(out))
        for b in model.single_transformer_blocks
    ]
    model(
        hidden_states=torch.tensor(x["img"]),
        encoder_hidden_states=txt,
        pooled_projections=pooled,
        timestep=torch.ones(len(x["img"])),
        guidance=torch.tensor(x["guidance"]),
        img_ids=torch.tensor(x["positions"], dtype=torch.float32),
        txt_ids=torch.zeros(TEXT, 3),
    )
    for h in hooks:
        h.remove()
    return [img for img, _ in double], [txt for _, txt in double], single


def run_reference(model, x, teacher, student, direction):
    """[per-kind terms by block, loss, gradients of text features and pooled vector]."""
    given = [torch.tensor(a, requires_grad=True) for a in student]
    with torch.no_grad():
        wanted = taps(model, x, *map(torch.tensor, teacher))
    with torch.enable_grad():
        return _terms(taps(model, x, *given), wanted, given, direction)


def _terms(found, wanted, given, direction):
    terms = []
    for ours, theirs in zip(found, wanted, strict=True):
        of_kind = []
        for s, t in zip(ours, theirs, strict=True):
            p, q = by_the_formula(s), by_the_formula(t)
            a, b = (p, q) if direction == "student_teacher" else (q, p)
            of_kind.append((a * (a.log() - b.log())).sum() / len(s))
        terms.append(torch.stack(of_kind))
    loss = torch.cat(terms).sum()
    loss.backward()
    return [a.detach().numpy() for a in (*terms, loss, given[0].grad, given[1].grad)]


def make_loss(flux, x, teacher, *, stream=None, remat="none", segment=0, **options):
    if stream is None:
        positions = jnp.broadcast_to(x["positions"], (*x["img"].shape[:2], 3))
        stream = ImageStream(x["img"], jnp.full(x["img"].shape[:2], TARGET), positions)
    probe = distill.DistillProbe(stream.roles_BI != PAD, **options)

    def loss(student):
        seen = flux.lockstep(
            stream,
            teacher,
            student,
            jnp.ones(len(x["img"])),
            x["guidance"],
            probe=probe,
            remat=remat,
            segment=segment,
        )
        return distill.distillation(seen).loss, seen

    return loss


def run_ours(loss, student):
    (value, seen), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(student)
    terms = [t.value_B.mean(-1) for t in (seen.double.img, seen.double.txt, seen.single)]
    return [np.asarray(a) for a in (*terms, value, *grads)]


def test_terms_loss_and_gradients_equal_the_formula_and_every_weight_matters():
    model, x = reference(CFG), inputs(CFG)
    teacher, student = conditions(1), conditions(2)
    ours = run_ours(make_loss(build(CFG, model), x, teacher), student)
    assert [a.shape for a in ours[:3]] == [(2,), (2,), (3,)]
    parity.assert_every_weight_matters(
        model,
        lambda: run_reference(model, x, teacher, student, "student_teacher"),
        ours,
        tol=1e-4,
        exempt=UNSEEN,
    )


def test_the_other_direction_equals_its_formula():
    model, x = reference(CFG), inputs(CFG)
    teacher, student = conditions(1), conditions(2)
    ours = run_ours(make_loss(build(CFG, model), x, teacher, direction="teacher_student"), student)
    wanted = run_reference(model, x, teacher, student, "teacher_student")
    assert parity.assert_parity(ours, wanted, tol=1e-4) < 1e-4
    published = run_reference(model, x, teacher, student, "student_teacher")
    assert parity.distance(ours, published) > 1e-2


@pytest.mark.parametrize(("remat", "segment"), [("full", 0), ("full", 2), ("attention", 8)])
def test_remat_and_segments_change_nothing(remat, segment):
    flux, x = build(CFG, reference(CFG)), inputs(CFG)
    teacher, student = conditions(1), conditions(2)
    plain = run_ours(make_loss(flux, x, teacher), student)
    ours = run_ours(make_loss(flux, x, teacher, remat=remat, segment=segment), student)
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max()))


def test_the_same_condition_costs_nothing_and_another_does():
    flux, x = build(CFG, reference(CFG)), inputs(CFG)
    loss = jax.jit(lambda c: make_loss(flux, x, conditions(1))(c)[0])
    assert abs(float(loss(conditions(1)))) < 1e-4
    assert float(loss(conditions(2))) > 0.1


def test_padding_does_not_count():
    flux, x = build(CFG, reference(CFG)), inputs(CFG)
    batch, count = x["img"].shape[:2]
    pad = lambda a, value: np.concatenate([a, np.full((batch, 5, *a.shape[2:]), value)], 1)  # noqa: E731
    stream = ImageStream(
        jnp.asarray(pad(x["img"], 7.0), jnp.float32),
        jnp.asarray(pad(np.full((batch, count), TARGET), PAD)),
        jnp.asarray(pad(np.broadcast_to(x["positions"], (batch, count, 3)), 3)),
    )
    teacher, student = conditions(1), conditions(2)
    for a, b in zip(
        run_ours(make_loss(flux, x, teacher, stream=stream), student),
        run_ours(make_loss(flux, x, teacher), student),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1, np.abs(b).max()))


def test_text_tokens_count_as_much_as_they_are_told():
    flux, x = build(CFG, reference(CFG)), inputs(CFG)
    teacher, student = conditions(1), conditions(2)
    none, half, full = (
        run_ours(make_loss(flux, x, teacher, text_weight=w), student) for w in (0.0, 0.5, 1.0)
    )
    for a, b, c in zip(none, half, full, strict=True):
        np.testing.assert_allclose((a + c) / 2, b, atol=1e-5 * max(1, np.abs(c).max()))
    img, txt, single = zip(none[:3], full[:3], strict=True)
    np.testing.assert_array_equal(*img)
    assert not txt[0].any() and txt[1].all()
    assert (single[0] > 0).all() and (single[0] < single[1]).all()
    with pytest.raises(ValueError, match="text_weight -1"):
        make_loss(flux, x, teacher, text_weight=-1)


def test_terms_that_are_not_finite_are_dropped_counted_and_harmless():
    flux, x = build(CFG, reference(CFG)), inputs(CFG)
    teacher, student = conditions(1), conditions(2)
    good = run_ours(make_loss(flux, x, teacher), student)
    broken = teacher[0].copy()
    broken[0, 1, 2] = np.inf
    loss = make_loss(flux, x, (broken, teacher[1]), remat="full", segment=2)
    (value, seen), grads = jax.value_and_grad(loss, has_aux=True)(student)
    assert int(distill.distillation(seen).dropped) == 2 + 2 + 3
    assert np.isfinite(value) and 0 < float(value) < float(good[3])
    for grad, before in zip(grads, good[4:], strict=True):
        np.testing.assert_array_equal(grad[0], 0)  # the sample that was dropped
        np.testing.assert_allclose(grad[1], before[1], atol=1e-5)


def test_constant_features_have_a_finite_gradient():
    x = jnp.ones((1, 2, 8)).at[0, 0].set(jnp.arange(8.0))
    grad = jax.grad(lambda x: distill.divergence(x, -x, None, 3.0, "student_teacher").sum())(x)
    assert np.isfinite(grad).all() and float(jnp.abs(grad[0, 0]).max()) > 0


def test_unknown_directions_are_refused():
    with pytest.raises(ValueError, match="unknown direction 'both': use one of student_teacher"):
        distill.DistillProbe(jnp.ones((1, 1), bool), direction="both")
