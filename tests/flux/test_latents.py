"""Packing and patches."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch

from x2jax.flux.latents import PAD, SOURCE, TARGET, pack, patchify, unpack_target, unpatchify


def test_patches_are_in_the_order_of_diffusers():
    x = np.random.default_rng(0).standard_normal((2, 6, 8, 4)).astype(np.float32)
    ours = patchify(jnp.asarray(x)).reshape(2, 12, 16)
    theirs = diffusers.FluxPipeline._pack_latents(torch.tensor(x).permute(0, 3, 1, 2), 2, 4, 6, 8)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(unpatchify(patchify(jnp.asarray(x))), x)


def test_streams_of_different_sizes_share_a_batch():
    """Sample 0: 2x3 target, 1x2 and 2x2 sources; sample 1: 4x4 target, no source."""
    grids = jnp.array([[[2, 3], [1, 2], [2, 2]], [[4, 4], [0, 0], [0, 0]]])
    x = jnp.arange(2 * 3 * 4 * 4, dtype=jnp.float32).reshape(2, 3, 4, 4, 1)
    out = jax.jit(lambda x, g: pack(x, g, 18, 64))(x, grids)
    expected = [x[0, 0, :2, :3], x[0, 1, :1, :2], x[0, 2, :2, :2]]
    expected = np.concatenate([np.asarray(e).ravel() for e in expected] + [np.zeros(6)])
    np.testing.assert_array_equal(out.tokens_BIC[0, :, 0], expected)
    np.testing.assert_array_equal(out.roles_BI[0], [TARGET] * 6 + [SOURCE] * 6 + [PAD] * 6)
    np.testing.assert_array_equal(out.roles_BI[1], [TARGET] * 16 + [PAD] * 2)
    np.testing.assert_array_equal(out.tokens_BIC[1, :16, 0], np.asarray(x[1, 0]).ravel())
    positions = [[0, r, c] for r in range(2) for c in range(3)]
    positions += [[0, 64, c] for c in range(2)]
    positions += [[0, 128 + r, c] for r in range(2) for c in range(2)]
    np.testing.assert_array_equal(out.positions_BI3[0, :12], positions)
    canvas = unpack_target(out.tokens_BIC, grids[:, 0], 4, 4)
    np.testing.assert_array_equal(canvas[0, :2, :3], x[0, 0, :2, :3])
    assert float(jnp.abs(canvas[0, 2:]).max()) == float(jnp.abs(canvas[0, :, 3:]).max()) == 0
    np.testing.assert_array_equal(canvas[1], x[1, 0])
