"""Attention within segments that lie one after another, without all scores at once.

The scores of 5,120 patches (one image of a megapixel) are 1.7 GB in float32. Windows are short, so
that near keys suffice; frames are as long as their picture, so that some queries at a time attend.
Both equal attention over everything with a mask, up to rounding.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

CHUNK = 512
"""Queries that attend at a time in `chunked`."""


def _attend(q_BQHK, k_BSHK, v_BSHK, queries_BQ, keys_BS):
    mask = queries_BQ[:, None, :, None] == keys_BS[:, None, None, :]
    # This path keeps logits and softmax in float32; a row without keys is finite.
    return jax.nn.dot_product_attention(q_BQHK, k_BSHK, v_BSHK, mask=mask, implementation="xla")


def _blocks(x_BP, size: int, fill=0):
    """(B, blocks, size, ...), filled up at the end."""
    pad = [(0, 0), (0, -x_BP.shape[1] % size), *[(0, 0)] * (x_BP.ndim - 2)]
    x_BP = jnp.pad(x_BP, pad, constant_values=fill)
    return x_BP.reshape(x_BP.shape[0], -1, size, *x_BP.shape[2:])


def windowed(
    q_BPHK: Float[Array, "B P H K"],
    k_BPHK: Float[Array, "B P H K"],
    v_BPHK: Float[Array, "B P H K"],
    segments_BP: Int[Array, "B P"],
    size: int,
) -> Float[Array, "B P H K"]:
    """Attention within segments of at most `size` tokens, each without a gap.

    Blocks of `size` queries see their own block and both neighbours: no segment reaches further.
    Longer segments, such as padding, attend to what of them lies there.
    """
    batch, length = segments_BP.shape

    def near(x, fill=0):
        x = _blocks(x, size, fill)
        edge = jnp.full_like(x[:, :1], fill)
        x = jnp.concatenate(
            [jnp.concatenate([edge, x[:, :-1]], 1), x, jnp.concatenate([x[:, 1:], edge], 1)], 2
        )
        return x.reshape(-1, *x.shape[2:])

    def own(x, fill=0):
        x = _blocks(x, size, fill)
        return x.reshape(-1, *x.shape[2:])

    out = _attend(
        own(q_BPHK), near(k_BPHK), near(v_BPHK), own(segments_BP, -1), near(segments_BP, -1)
    )
    return out.reshape(batch, -1, *out.shape[2:])[:, :length]


def chunked(
    q_BPHK: Float[Array, "B P H K"],
    k_BPHK: Float[Array, "B P H K"],
    v_BPHK: Float[Array, "B P H K"],
    segments_BP: Int[Array, "B P"],
    chunk: int = CHUNK,
) -> Float[Array, "B P H K"]:
    """Attention within segments of any length, `chunk` queries at a time."""
    batch, length = segments_BP.shape
    if length <= chunk:
        return _attend(q_BPHK, k_BPHK, v_BPHK, segments_BP, segments_BP)

    def some(item):
        return _attend(item[0], k_BPHK, v_BPHK, item[1], segments_BP)

    queries = (_blocks(q_BPHK, chunk), _blocks(segments_BP, chunk))
    out = jax.lax.map(some, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), queries))
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1, *out.shape[3:])[:, :length]
