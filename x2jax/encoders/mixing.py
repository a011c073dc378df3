"""Hidden states summed into one plane as they appear, none of them kept.

AlignNet mixes every hidden state of the language model linearly. The stack of them is 106 MB a
sample (7B, 512 tokens, bfloat16), in training from the forward pass of AlignNet to its backward
pass, which is the last of a step. A sum in the scan's carry is one plane. Its gradient with respect
to the weight of a state needs that state once more, so the backward pass runs the layers again: one
more forward pass of the language model, and nothing stored.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

Add = Callable[[Array, Array, Array], Array]
"""(total_BTD, state_BTD, weight) -> total_BTD; linear in total and in the weight."""


def mix(
    model: Any, add: Add, weights_N: Array, start_BTD: Array, arguments: Any, select_BT: Any = None
) -> Array:
    """Adds up the hidden states of a decoder, from the embeddings to the normed last one.

    Differentiable in `weights_N` and `start_BTD` alone: no gradient enters the model.

    Args:
      model: has `enter(*arguments) -> (x_BTD, layer)`, `layers` and `norm`.
      add: adds one state to the sum.
      weights_N: a weight for each state, on axis 0.
      start_BTD: the sum before the first state; its dtype is that of the sum.
      arguments: of `model.enter`.
      select_BT: which tokens' states are added, and where; None for all in order.
    """
    graph, state = nnx.split(model)
    return _mix(graph, add, weights_N, start_BTD, state, (arguments, select_BT))


def _scan(graph, weights_N, start_BTD, state, inputs, visit):
    """Runs the layers; `visit(carry, state_BTD, weight) -> (carry, out)` sees every state."""
    model = nnx.merge(graph, state)
    arguments, select_BT = inputs
    x, layer = model.enter(*arguments)

    def chosen(x):
        if select_BT is None:
            return x
        return jnp.take_along_axis(x, select_BT[..., None], axis=1)

    def body(carry, item):
        x, seen = carry
        module, weight = item
        seen, out = visit(seen, chosen(x), weight)
        return (layer(module, x), seen), out

    # The state before a layer is a state: only the last one, which is normed, comes after the scan.
    (x, seen), outs = jax.lax.scan(body, (x, start_BTD), (model.layers, weights_N[:-1]))
    return visit(seen, chosen(model.norm(x)), weights_N[-1]), outs


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mix(graph, add, weights_N, start_BTD, state, inputs):
    def visit(total, x, weight):
        return add(total, x, weight), None

    (total, _), _ = _scan(graph, weights_N, start_BTD, state, inputs, visit)
    return total


def _forward(graph, add, weights_N, start_BTD, state, inputs):
    out = _mix(graph, add, weights_N, start_BTD, state, inputs)
    return out, (weights_N, start_BTD, state, inputs)


def _backward(graph, add, kept, grad_BTD):
    weights_N, start_BTD, state, inputs = kept

    def visit(_, x, weight):
        _, pull = jax.vjp(lambda w: add(jnp.zeros_like(start_BTD), x, w), weight)
        return (), pull(grad_BTD)[0]

    (_, last), grads = _scan(graph, weights_N, (), state, inputs, visit)
    return jnp.concatenate([grads, last[None]]), grad_BTD, None, None


_mix.defvjp(_forward, _backward)
