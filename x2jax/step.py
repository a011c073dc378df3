"""One training step: a free function of (state, frozen, batches) under one `jax.jit`."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from x2jax.state import TrainState
from x2jax.trees import Params

Metrics = dict[str, jax.Array]


class Loss(Protocol):
    """A recipe's objective: differentiated with respect to `params` alone."""

    def __call__(
        self, params: Params, frozen: Params, batch: Any, key: jax.Array
    ) -> tuple[jax.Array, Metrics]: ...


def make_step(
    loss: Loss, tx: optax.GradientTransformation, *, seed: int, ema_decay: float
) -> Callable[[TrainState, Params, Any], tuple[TrainState, Metrics]]:
    """Builds the step over batches stacked on a leading accumulation axis.

    Gradients and metrics are means over the micro-batches. Randomness is a function of the seed,
    the step and the micro-batch alone, so a resumed run draws what the uninterrupted one drew.
    Metrics named `count_*` are summed instead.
    """
    grad = jax.value_and_grad(loss, has_aux=True)

    def step(state: TrainState, frozen: Params, batches: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        accumulate = jax.tree.leaves(batches)[0].shape[0]

        def micro(i, batch):
            (value, metrics), grads = grad(state.params, frozen, batch, jax.random.fold_in(key, i))
            return grads, {"loss": value, **metrics}

        if accumulate == 1:
            grads, metrics = micro(0, jax.tree.map(lambda x: x[0], batches))
        else:

            def body(total, item):
                grads, metrics = micro(*item)
                return jax.tree.map(jnp.add, total, grads), metrics

            zeros = jax.tree.map(jnp.zeros_like, state.params)
            grads, stacked = jax.lax.scan(body, zeros, (jnp.arange(accumulate), batches))
            grads = jax.tree.map(lambda g: g / accumulate, grads)
            metrics = {k: _reduce(k, v) for k, v in stacked.items()}

        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = {k: e + (1 - ema_decay) * (params[k] - e) for k, e in state.ema.items()}
        metrics |= {"grad_norm": optax.global_norm(grads), "param_norm": optax.global_norm(params)}
        return TrainState(state.step + 1, params, opt_state, ema), metrics

    return step


def _reduce(name: str, values: jax.Array) -> jax.Array:
    return values.sum() if name.startswith("count_") else values.mean()
