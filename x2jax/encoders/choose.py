"""Constrained decoding among known answers: all of them are scored exactly, in one pass.

The answers' tokens form a tree. The pass reads the prompt and the whole tree, every node seeing the
prompt and its own branch, so a common beginning is read once and nothing is decoded step by step.
Axes beside `x2jax/shapes.py`: M nodes of the tree, here C answers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from x2jax.encoders.decoder import Decoder, causal, text_positions


class Tree(NamedTuple):
    """Several token sequences with their common beginnings merged.

    Attributes:
      tokens_M: a node's token.
      parents_M: the node before it, always an earlier one; -1 for a first token.
      depths_M: tokens before it in its sequence.
      sees_MM: whether a node attends to another: to itself and those on the way to it.
      nodes_CM: the nodes of a sequence.
    """

    tokens_M: Int[np.ndarray, "M"]
    parents_M: Int[np.ndarray, "M"]
    depths_M: Int[np.ndarray, "M"]
    sees_MM: Bool[np.ndarray, "M M"]
    nodes_CM: Bool[np.ndarray, "C M"]


def tree(sequences: Sequence[Sequence[int]]) -> Tree:
    """Merges sequences; end each with a token of its own, so that none begins another.

    Raises:
      ValueError: one is empty, or is the beginning of another.
    """
    found: dict[tuple[int, ...], int] = {}
    for sequence in sequences:
        for end in range(1, len(sequence) + 1):
            found.setdefault(tuple(sequence[:end]), len(found))
    ends = [tuple(s) for s in sequences]
    inner = {prefix[:-1] for prefix in found}
    if () in ends or inner & set(ends) or len(set(ends)) < len(ends):
        raise ValueError("sequences must differ, hold a token, and not begin one another")
    nodes = [{found[s[:end]] for end in range(1, len(s) + 1)} for s in found]
    numbers = range(len(found))
    return Tree(
        np.array([s[-1] for s in found], np.int32),
        np.array([found.get(s[:-1], -1) for s in found], np.int32),
        np.array([len(s) - 1 for s in found], np.int32),
        np.array([[m in on for m in numbers] for on in nodes]),
        np.array([[m in nodes[found[s]] for m in numbers] for s in ends]),
    )


def log_probabilities(
    model: Decoder, ids_BT: Int[Array, "B T"], mask_BT: Bool[Array, "B T"], names: Tree
) -> Float[Array, "B C"]:
    """Log probability of each of a tree's sequences as the continuation of left-padded prompts."""
    batch, length = ids_BT.shape
    count = len(names.tokens_M)
    nodes_BM = jnp.tile(jnp.asarray(names.tokens_M), (batch, 1))
    ahead = mask_BT.sum(axis=1, keepdims=True) + names.depths_M
    # Rows see the prompt, then the tree: nothing of the tree is seen from the prompt.
    above = jnp.pad(causal(mask_BT, model.cfg.pad_attention), ((0, 0), (0, 0), (0, count)))
    below = jnp.concatenate(
        [
            jnp.broadcast_to(mask_BT[:, None], (batch, count, length)),
            jnp.broadcast_to(names.sees_MM, (batch, count, count)),
        ],
        axis=2,
    )
    read = model.run(
        model.embed_tokens(jnp.concatenate([ids_BT, nodes_BM], axis=1)),
        jnp.concatenate([text_positions(mask_BT), ahead], axis=1),
        jnp.concatenate([above, below], axis=1),
        model.empty_cache(batch, length + count),
        keep_states=False,
    )
    # A node is predicted by its parent, a first node by the last token of the prompt.
    logits = model.logits(read.last_BTD[:, length - 1 :]).astype(jnp.float32)
    logits = logits[:, names.parents_M + 1]
    chosen = jnp.take_along_axis(logits, nodes_BM[..., None], axis=-1)[..., 0]
    edges_BM = chosen - jax.nn.logsumexp(logits, axis=-1)
    return jnp.where(names.nodes_CM, edges_BM[:, None], 0).sum(axis=-1)
