"""What training changes: everything that a checkpoint holds, and nothing that it does not."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from x2jax.sharding import tree_shardings
from x2jax.trees import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Attributes:
    step: optimizer steps done.
    params: the trainable tree, path -> array, float32.
    opt_state: Optax state over `params`.
    ema: exponential moving average of `params`; empty when off.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    ema: Params


def create(params: Params, tx: optax.GradientTransformation, ema: bool) -> TrainState:
    """The state at step 0. Call under `jax.jit` with the shardings of `shardings`."""
    # Copies: donating a state whose EMA, or Prodigy's start, aliases its parameters would free
    # them twice.
    average = jax.tree.map(jnp.copy, params) if ema else {}
    moments = tx.init(jax.tree.map(jnp.copy, params))
    return TrainState(jnp.zeros((), jnp.int32), params, moments, average)


def shardings(abstract: TrainState, by_path: dict, mesh: Mesh) -> TrainState:
    """Moments and averages lie where their parameters lie."""
    return tree_shardings(abstract, by_path, abstract.params, mesh)
