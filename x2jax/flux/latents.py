"""The packed image stream: target, source and padding tokens as data: one program for all sizes.

A canvas holds one image top-left, zeros beyond its size. Packing gathers the valid 2x2 patches of
all of a sample's canvases, one image after another, into a fixed budget of tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

PAD, TARGET, SOURCE = 0, 1, 2


class ImageStream(NamedTuple):
    """One packed image stream a sample; padding comes last.

    Attributes:
      tokens_BIC: packed latents, zero at padding.
      roles_BI: PAD, TARGET or SOURCE of every token.
      positions_BI3: position ids (0, row, column); row is offset for sources.
    """

    tokens_BIC: Float[Array, "B I C"]
    roles_BI: Int[Array, "B I"]
    positions_BI3: Int[Array, "B I 3"]


def patchify(latents_BhwZ: Float[Array, "*b h w Z"]) -> Float[Array, "*b h/2 w/2 Z*4"]:
    """2x2 patches to channels in FLUX's order: channel slowest, then row, then column."""
    *b, h, w, z = latents_BhwZ.shape
    x = latents_BhwZ.reshape(*b, h // 2, 2, w // 2, 2, z)
    n = len(b)
    x = jnp.transpose(x, (*range(n), n, n + 2, n + 4, n + 1, n + 3))
    return x.reshape(*b, h // 2, w // 2, z * 4)


def unpatchify(patches_BhwC: Float[Array, "*b h w C"]) -> Float[Array, "*b h*2 w*2 C/4"]:
    """Inverse of `patchify`."""
    *b, h, w, c = patches_BhwC.shape
    x = patches_BhwC.reshape(*b, h, w, c // 4, 2, 2)
    n = len(b)
    x = jnp.transpose(x, (*range(n), n, n + 3, n + 1, n + 4, n + 2))
    return x.reshape(*b, h * 2, w * 2, c // 4)


def pack(
    patches_BShwC: Float[Array, "B S h w C"],
    grids_BS2: Int[Array, "B S 2"],
    budget: int,
    source_offset: int,
) -> ImageStream:
    """Packs canvases of patches into one stream of `budget` tokens a sample.

    Args:
      patches_BShwC: patchified latents; slot 0 is the target, then the sources.
      grids_BS2: valid (rows, columns) of patches in every slot, (0, 0) for an empty slot.
      budget: tokens a sample, at least the sum of rows x columns over its slots. The caller
        guarantees it (the loader's buckets do); tokens beyond the budget would be cut.
      source_offset: rows added to the position ids of source j, j times (j = 1, 2, ...).
    """
    _, slots, h, w, c = patches_BShwC.shape
    counts_BS = grids_BS2[..., 0] * grids_BS2[..., 1]
    ends_BS = jnp.cumsum(counts_BS, axis=1)
    index = jnp.arange(budget)

    def one(patches_ShwC, grids_S2, ends_S):
        slot_I = jnp.searchsorted(ends_S, index, side="right")
        valid_I = slot_I < slots
        slot_I = jnp.minimum(slot_I, slots - 1)
        start_I = jnp.where(slot_I > 0, ends_S[slot_I - 1], 0)
        columns_I = jnp.maximum(grids_S2[slot_I, 1], 1)
        row_I, col_I = (index - start_I) // columns_I, (index - start_I) % columns_I
        flat_I = jnp.where(valid_I, (slot_I * h + row_I) * w + col_I, 0)
        tokens = jnp.take(patches_ShwC.reshape(-1, c), flat_I, axis=0, mode="clip")
        roles = jnp.where(valid_I, jnp.where(slot_I == 0, TARGET, SOURCE), PAD)
        positions = jnp.stack(
            [jnp.zeros_like(row_I), row_I + slot_I * source_offset, col_I], axis=-1
        )
        return (
            jnp.where(valid_I[:, None], tokens, 0),
            roles.astype(jnp.int32),
            jnp.where(valid_I[:, None], positions, 0).astype(jnp.int32),
        )

    return ImageStream(*jax.vmap(one)(patches_BShwC, grids_BS2, ends_BS))


def unpack_target(
    tokens_BIC: Float[Array, "B I C"], grids_B2: Int[Array, "B 2"], h: int, w: int
) -> Float[Array, "B h w C"]:
    """Target tokens back to a canvas of h x w patches, zero beyond each sample's grid."""
    rows, cols = jnp.arange(h)[:, None], jnp.arange(w)[None, :]

    def one(tokens_IC, grid):
        inside = (rows < grid[0]) & (cols < grid[1])
        flat = jnp.where(inside, rows * grid[1] + cols, 0)
        return jnp.where(inside[..., None], tokens_IC[flat], 0)

    return jax.vmap(one)(tokens_BIC, grids_B2)
