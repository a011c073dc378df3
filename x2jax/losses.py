"""Objectives (spec x2edit.md section 4). All in float32."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from x2jax.flux.layers import DoubleTaps
from x2jax.flux.scan import Probe


def flow_loss(
    velocity_BIC: Float[Array, "B I C"],
    target_BIC: Float[Array, "B I C"],
    is_target_BI: Bool[Array, "B I"],
    weight_B: Float[Array, "B"],
) -> Float[Array, "B"]:
    """Mean squared error over each sample's target tokens, weighted; reduce with a mean over B.

    DIFFERS: the published loss averages over a batch of one aspect ratio; with mixed ratios every
    sample has the same weight, whatever its number of tokens. Equal for one ratio.
    """
    error = jnp.square(velocity_BIC.astype(jnp.float32) - target_BIC.astype(jnp.float32))
    mask = is_target_BI[..., None]
    count = jnp.maximum(is_target_BI.sum(axis=1) * velocity_BIC.shape[-1], 1)
    return weight_B * jnp.where(mask, error, 0).sum(axis=(1, 2)) / count


class Gram(NamedTuple):
    """Inner products of flattened target-token states.

    Attributes:
      products_BB: h_i . h_j; the gradient through j is cut where the probe was told to.
      squares_B: h_i . h_i, with its gradient.
    """

    products_BB: Float[Array, "*l B B"]
    squares_B: Float[Array, "*l B"]


@dataclasses.dataclass(frozen=True)
class GramProbe(Probe):
    """The Gram matrix of the target states after every double block, over the *global* batch.

    In a mesh, features are resharded over the devices (an all-to-all) and contracted there, instead
    of gathering every sample's 12.6 M features on every device.

    Attributes:
      is_target_BI: which tokens count.
      stop_gradient: no gradient through the gathered side.
    """

    is_target_BI: Bool[Array, "B I"]
    stop_gradient: bool = True

    def double(self, *taps: DoubleTaps) -> Gram:
        (tap,) = taps
        h = jnp.where(self.is_target_BI[..., None], tap.img_BID, 0)
        flat_BF = h.reshape(h.shape[0], -1)
        squares = jnp.square(h.astype(jnp.float32)).sum(axis=(1, 2))
        mesh = jax.sharding.get_abstract_mesh()
        if not mesh.empty and mesh.size > 1:
            axes = tuple(a for a in mesh.axis_names if a in ("data", "fsdp"))
            flat_BF = jax.lax.with_sharding_constraint(flat_BF, P(None, axes))
        other_BF = jax.lax.stop_gradient(flat_BF) if self.stop_gradient else flat_BF
        products = jnp.einsum("IF,JF->IJ", flat_BF, other_BF, preferred_element_type=jnp.float32)
        return Gram(products, squares)


class Contrastive(NamedTuple):
    """Attributes:
    loss: mean over anchors and blocks.
    lonely: anchors with no other sample of their task in the batch; each costs about 18.
    """

    loss: Float[Array, ""]
    lonely: Int[Array, ""]


def contrastive_loss(
    gram: Gram, task_B: Int[Array, "B"], *, temperature: float = 0.5, stop_gradient: bool = True
) -> Contrastive:
    """Supervised contrastive loss on squared distances of L2-normalised states.

    With d_ij = 2 - 2 cos(h_i, h_j) and s_ij = exp(-d_ij / temperature):
    loss_i = -log((sum over j != i of i's task of s_ij + 1e-8) / (sum over all j of s_ij + 1e-8)).

    Args:
      gram: probes stacked over blocks, products (blocks, B, B).
      task_B: task ids; equal ids are positives.
      temperature: 0.5 in the releases.
      stop_gradient: no gradient through the gathered side j, as the reference; must equal what the
        probe was made with.
    """
    norms = jnp.sqrt(gram.squares_B + 1e-12)
    other = jax.lax.stop_gradient(norms) if stop_gradient else norms
    cosine = gram.products_BB / (norms[..., :, None] * other[..., None, :])
    similarity = jnp.exp(-(2 - 2 * cosine) / temperature)
    same = (task_B[:, None] == task_B[None, :]) & ~jnp.eye(task_B.shape[0], dtype=bool)
    positive = jnp.where(same, similarity, 0).sum(-1) + 1e-8
    loss = -jnp.log(positive / (similarity.sum(-1) + 1e-8))
    return Contrastive(loss.mean(), (~same.any(axis=1)).sum())
