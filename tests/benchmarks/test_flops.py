"""The counter of operations, against counts by hand."""

import jax
import jax.numpy as jnp

from benchmarks.flops import flops


def of(*shape):
    return jax.ShapeDtypeStruct(shape, "float32")


def chain(x, weights):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0].sum()


def test_loops_count_as_often_as_they_run_and_backwards_too():
    one = 2 * 3 * 4 * 4
    assert flops(chain, of(3, 4), of(7, 4, 4)) == 7 * one
    assert flops(jax.grad(chain), of(3, 4), of(7, 4, 4)) == 14 * one, "no gradient of weights"
    assert flops(jax.grad(chain, argnums=(0, 1)), of(3, 4), of(7, 4, 4)) == 21 * one

    def remat(x, weights):
        step = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return jax.lax.scan(step, x, weights)[0].sum()

    assert flops(jax.grad(remat), of(3, 4), of(7, 4, 4)) == 21 * one, "once more under remat"


def test_batched_products_convolutions_and_branches():
    assert flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), of(5, 2, 3), of(5, 3, 4)) == 240

    def conv(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=numbers)

    assert flops(conv, of(2, 8, 8, 3), of(3, 3, 3, 5)) == 2 * (2 * 4 * 4 * 5) * (3 * 3 * 3)

    def either(x):
        return jax.lax.cond(x.sum() > 0, lambda x: x @ x, lambda x: x @ x @ x, x)

    assert flops(jax.jit(either), of(4, 4)) == 2 * 128
