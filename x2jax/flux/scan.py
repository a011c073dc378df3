"""Scanning blocks: remat of every block, and forgetting lanes that can be computed again.

A lane is one sample batch on its way through the blocks. Several lanes go through each block
together, so that a probe can compare them while both are there.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from x2jax.flux.layers import Context, DoubleTaps, SingleTaps

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention", "attention_residuals"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""Remat policies by name; "none" keeps every activation."""


TAPS = "passive_taps"
"""Checkpoint name of what a probe may see of a passive lane."""


class Probe:
    """Looks at the blocks as they run; what a method returns is stacked over the blocks.

    Subclass it and override what you need. Each method gets the taps of every lane, in order.
    """

    def double(self, *taps: DoubleTaps) -> Any:
        """Called after every double block."""
        return None

    def single(self, *taps: SingleTaps) -> Any:
        """Called after every single block."""
        return None


class Lane(NamedTuple):
    """One batch on its way.

    Attributes:
      ctx: what its blocks share.
      txt_BTD, img_BID: its two streams.
      passive: no gradient flows through it.
    """

    ctx: Context
    txt_BTD: Float[Array, "B T D"]
    img_BID: Float[Array, "B I D"]
    passive: bool = False


def scan_blocks(
    body: Callable[[Any, Any], tuple[Any, Any]],
    lanes: tuple[Any, ...],
    layers: Any,
    *,
    passive: tuple[bool, ...],
    remat: str,
    segment: int,
) -> tuple[tuple[Any, ...], Any]:
    """`jax.lax.scan` of a block over stacked layers, with remat.

    Backwards, a probe that compares lanes needs the taps of the passive ones again. With remat and
    `segment` 0 they are kept: one tensor a block, beside the one that remat keeps of active lanes.
    With `segment` = k, all lanes are kept at every k-th block only, and in the backward pass k
    blocks of them are computed once more: for n blocks n / k + k tensors a lane instead of n, for
    one more forward pass.

    Args:
      body: (lanes, layer) -> (lanes, what the probe saw); taps of passive lanes are named `TAPS`.
      lanes: a tuple with the streams of each lane.
      layers: parameters, stacked on axis 0.
      passive: which lanes no gradient flows through.
      remat: "none" or a key of `REMAT_POLICIES`.
      segment: blocks between two kept states of the lanes; without effect under "none" or where
        no lane is passive.

    Raises:
      ValueError: unknown policy, or a negative segment.
    """
    if remat != "none" and remat not in REMAT_POLICIES:
        raise ValueError(f"unknown remat policy {remat!r}: use none, {', '.join(REMAT_POLICIES)}")
    if segment < 0:
        raise ValueError(f"segment {segment}: needs 0 (off) or a number of blocks")
    if remat == "none":
        return jax.lax.scan(body, lanes, layers)
    policies = jax.checkpoint_policies
    policy = policies.save_from_both_policies(
        REMAT_POLICIES[remat], policies.save_only_these_names(TAPS)
    )
    # prevent_cse guards against merging across the checkpoint, which a scan already rules out.
    block = jax.checkpoint(body, policy=policy, prevent_cse=False)
    if not segment or not any(passive):
        return jax.lax.scan(block, lanes, layers)
    count = jax.tree.leaves(layers)[0].shape[0]
    segment = min(segment, count)

    def step(lanes, i):
        # By index, not by slices of the stack: those would be copies of the weights.
        at = lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)  # noqa: E731
        return block(lanes, jax.tree.map(at, layers))

    def several(lanes, indices):
        return jax.lax.scan(step, lanes, indices)

    def forgotten(lanes, indices, *, in_scan: bool):
        keep = policies.nothing_saveable
        return jax.checkpoint(several, policy=keep, prevent_cse=not in_scan)(lanes, indices)

    indices, whole = jnp.arange(count), count - count % segment
    by_segment = indices[:whole].reshape(-1, segment)
    lanes, seen = jax.lax.scan(functools.partial(forgotten, in_scan=True), lanes, by_segment)
    seen = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), seen)
    if whole < count:
        lanes, rest = forgotten(lanes, indices[whole:], in_scan=False)
        seen = jax.tree.map(lambda *x: jnp.concatenate(x), seen, rest)
    return lanes, seen
