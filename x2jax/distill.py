"""Distillation of AlignNet: distributions over features, compared block by block.

Spec x2i.md section 2. In float32; one number a block and sample is all that remains.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from x2jax.flux import Probe, Seen
from x2jax.flux.layers import DoubleTaps, SingleTaps

DIRECTIONS = ("student_teacher", "teacher_student")


def log_probabilities(x: Float[Array, "... D"], temperature: float) -> Float[Array, "... D"]:
    """log softmax(n(x) / temperature), n(x) = (x - mean) / (1e-7 + unbiased std) over features."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).sum(-1, keepdims=True) / (x.shape[-1] - 1)
    # The square root has no gradient at 0: a constant row is all zeros, and stays.
    constant = variance == 0
    std = jnp.where(constant, 0.0, jnp.sqrt(jnp.where(constant, 1.0, variance)))
    return jax.nn.log_softmax(centred / (1e-7 + std) / temperature, axis=-1)


def divergence(
    student_BLD: Float[Array, "B L D"],
    teacher_BLD: Float[Array, "B L D"],
    weight_BL: Float[Array, "B L"] | None,
    temperature: float,
    direction: str,
) -> Float[Array, "B"]:
    """KL divergence of the feature distributions, summed over tokens; no gradient to the teacher.

    Args:
      student_BLD, teacher_BLD: the same tensor under either conditioning.
      weight_BL: what a token counts; None for 1 each. Where it is 0 no value matters.
      temperature: 3 in the releases.
      direction: "student_teacher" is KL(student || teacher), as published; "teacher_student" the
        other one.
    """
    student = log_probabilities(student_BLD, temperature)
    teacher = log_probabilities(jax.lax.stop_gradient(teacher_BLD), temperature)
    if direction == "student_teacher":
        kl_BL = (jnp.exp(student) * (student - teacher)).sum(-1)
    else:
        kl_BL = (jnp.exp(teacher) * (teacher - student)).sum(-1)
    if weight_BL is not None:
        kl_BL = jnp.where(weight_BL > 0, weight_BL * kl_BL, 0)
    return kl_BL.sum(-1)


class Term(NamedTuple):
    """One tensor's divergence.

    Attributes:
      value_B: of every sample; 0 where it is not finite.
      dropped_B: samples whose divergence is not finite.
    """

    value_B: Float[Array, "*l B"]
    dropped_B: Bool[Array, "*l B"]


class DoubleTerms(NamedTuple):
    """Terms of a double block's two streams."""

    img: Term
    txt: Term


@dataclasses.dataclass(frozen=True)
class DistillProbe(Probe):
    """Compares the taps of a teacher and a student lane.

    Attributes:
      valid_BI: image tokens that count: no padding.
      temperature: of the distributions.
      direction: one of `DIRECTIONS`.
      text_weight: what a text token counts, an image token counting 1.
    """

    valid_BI: Bool[Array, "B I"]
    temperature: float = 3.0
    direction: str = "student_teacher"
    text_weight: float = 1.0

    def __post_init__(self):
        if self.direction not in DIRECTIONS:
            raise ValueError(
                f"unknown direction {self.direction!r}: use one of {', '.join(DIRECTIONS)}"
            )
        if self.text_weight < 0:
            raise ValueError(f"text_weight {self.text_weight}: needs 0 or more")

    def double(self, *taps: DoubleTaps) -> DoubleTerms:
        teacher, student = taps
        img_BI, txt_BT = self._weights(student.txt_attn_BTD.shape[1])
        return DoubleTerms(
            self._term(student.img_attn_BID, teacher.img_attn_BID, img_BI),
            self._term(student.txt_attn_BTD, teacher.txt_attn_BTD, txt_BT),
        )

    def single(self, *taps: SingleTaps) -> Term:
        teacher, student = taps
        img_BI, txt_BT = self._weights(student.attn_BLD.shape[1] - self.valid_BI.shape[1])
        weight_BL = jnp.concatenate([txt_BT, img_BI], axis=1)
        return self._term(student.attn_BLD, teacher.attn_BLD, weight_BL)

    def _weights(self, text: int):
        """What tokens of the image count, and `text` tokens of text."""
        img_BI = self.valid_BI.astype(jnp.float32)
        return img_BI, jnp.full((len(img_BI), text), self.text_weight)

    def _term(self, student, teacher, weight_BL) -> Term:
        kl = lambda s, t: divergence(s, t, weight_BL, self.temperature, self.direction)  # noqa: E731
        dropped_B = ~jnp.isfinite(kl(jax.lax.stop_gradient(student), teacher))
        # Its gradient would not be finite either, were it only masked afterwards.
        student, teacher = (jnp.where(dropped_B[:, None, None], 0, x) for x in (student, teacher))
        return Term(kl(student, teacher), dropped_B)


class Distillation(NamedTuple):
    """Attributes:
    loss: the sum of all terms, each divided by the batch size.
    double_img, double_txt, single: the sums by kind of block.
    dropped: terms of samples that are not finite, and left out.
    """

    loss: Float[Array, ""]
    double_img: Float[Array, ""]
    double_txt: Float[Array, ""]
    single: Float[Array, ""]
    dropped: Int[Array, ""]


def distillation(seen: Seen) -> Distillation:
    """The loss from what a `DistillProbe` saw.

    DIFFERS: a term that is not finite is left out for the sample in which it is, and counted; the
    published code leaves it out for the batch.
    """
    terms = (seen.double.img, seen.double.txt, seen.single)
    sums = [t.value_B.mean(axis=-1).sum() for t in terms]
    dropped = sum((t.dropped_B.sum() for t in terms), jnp.zeros((), jnp.int32))
    return Distillation(sum(sums[1:], sums[0]), *sums, dropped)
