"""Task-aware MoE-LoRA on one projection (spec x2edit.md section 3).

Every token adds the deltas of its top-k experts, weighted by an unnormalised softmax gate on token
and task, and that of one shared expert with weight 1. A plain LoRA is the shared expert alone.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


def gate_scores(
    x_BLD: Float[Array, "B L D"],
    task_BD: Float[Array, "B D"],
    gate_x: Float[Array, "D E"],
    gate_task: Float[Array, "D E"],
) -> Float[Array, "B L E"]:
    """softmax([x, task] Wg^T) in float32; the task half is computed once a sample."""
    x_logits = jnp.einsum("BLD,DE->BLE", x_BLD.astype(jnp.float32), gate_x.astype(jnp.float32))
    task_logits = task_BD.astype(jnp.float32) @ gate_task.astype(jnp.float32)
    return jax.nn.softmax(x_logits + task_logits[:, None], axis=-1)


def top_k_gate(p_BLE: Float[Array, "B L E"], k: int) -> Float[Array, "B L E"]:
    """p at its k largest entries, 0 elsewhere, not renormalised; ties go to the lower index.

    Repeated argmax instead of `jax.lax.top_k`, whose gradient scatters (jax.md section 3).
    """
    index = jax.lax.broadcasted_iota(jnp.int32, p_BLE.shape, p_BLE.ndim - 1)
    chosen = jnp.zeros(p_BLE.shape, bool)
    for _ in range(k):
        best = jnp.where(chosen, -jnp.inf, p_BLE).argmax(-1, keepdims=True)
        chosen |= index == best
    return jnp.where(chosen, p_BLE, 0)


def moe_lora(
    x_BLD: Float[Array, "B L D"],
    down_DER: Float[Array, "D E+1 R"],
    up_ERO: Float[Array, "E+1 R O"],
    gate_BLE: Float[Array, "B L E"] | None,
    *,
    top_k: int = 2,
    form: str = "static",
) -> Float[Array, "B L O"]:
    """Sum over experts of gate * (x A) B; the last expert is shared and has weight 1.

    Args:
      x_BLD: input, in the compute dtype.
      down_DER, up_ERO: all experts' matrices.
      gate_BLE: weights of the routed experts, zero where one is not chosen; None for a plain LoRA.
      top_k: how many entries of `gate_BLE` are nonzero; read by the routed form.
      form: "static" runs all experts as one low-rank product with the gate in the middle: more
        FLOPs, several times fewer bytes, no shape that depends on the routing. "routed" sorts
        tokens by expert and runs only the chosen ones. Equal up to rounding.
    """
    down_DER, up_ERO = down_DER.astype(x_BLD.dtype), up_ERO.astype(x_BLD.dtype)
    if gate_BLE is None or form == "static":
        return _static(x_BLD, down_DER, up_ERO, gate_BLE)
    if form != "routed":
        raise ValueError(f"unknown form {form!r}: use 'static' or 'routed'")
    shared = _static(x_BLD, down_DER[:, -1:], up_ERO[-1:], None)
    return shared + _routed(x_BLD, down_DER[:, :-1], up_ERO[:-1], gate_BLE, top_k)


def _static(x_BLD, down_DER, up_ERO, gate_BLE):
    d, e, r = down_DER.shape
    hidden = (x_BLD @ down_DER.reshape(d, e * r)).reshape(*x_BLD.shape[:2], e, r)
    if gate_BLE is not None:
        gates = jnp.pad(gate_BLE, ((0, 0), (0, 0), (0, 1)), constant_values=1)
        hidden *= gates[..., None].astype(hidden.dtype)
    return hidden.reshape(*x_BLD.shape[:2], e * r) @ up_ERO.reshape(e * r, -1)


def _routed(x_BLD, down_DER, up_ERO, gate_BLE, top_k):
    batch, length, d = x_BLD.shape
    experts = gate_BLE.shape[-1]
    x_ND, gate_NE = x_BLD.reshape(-1, d), gate_BLE.reshape(-1, experts)
    weight_Nk, expert_Nk = jax.lax.top_k(gate_NE, top_k)
    order = jnp.argsort(expert_Nk.reshape(-1), stable=True)
    token = order // top_k
    sizes = jnp.bincount(expert_Nk.reshape(-1), length=experts).astype(jnp.int32)
    hidden = jax.lax.ragged_dot(x_ND[token], down_DER.swapaxes(0, 1), sizes)
    hidden *= weight_Nk.reshape(-1)[order][:, None].astype(hidden.dtype)
    delta = jax.lax.ragged_dot(hidden, up_ERO, sizes)
    out = jnp.zeros((x_ND.shape[0], up_ERO.shape[-1]), delta.dtype).at[token].add(delta)
    return out.reshape(batch, length, -1)


def drop_inputs(x: Float[Array, "..."], rate: float, key: Array) -> Float[Array, "..."]:
    """Zeros entries with probability `rate` and scales up the rest, so that the mean stays."""
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)


class MoELoRA(nnx.Module):
    """The adapter of one projection. Initially a zero delta: up projections are zero.

    Attributes:
      drop_key: PRNG key of dropout; None, as outside training, drops nothing.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        *,
        experts: int,
        rank: int,
        top_k: int,
        scale: float,
        series: bool,
        form: str,
        dropout: float = 0.0,
        param_dtype,
        rngs: nnx.Rngs,
    ):
        self.top_k, self.scale, self.series, self.form = top_k, scale, series, form
        self.dropout, self.drop_key = dropout, nnx.data(None)
        down = jax.random.normal(rngs.params(), (in_width, experts + 1, rank), param_dtype) / rank
        self.down = nnx.Param(down)
        self.up = nnx.Param(jnp.zeros((experts + 1, rank, out_width), param_dtype))
        if experts:
            # Kaiming-uniform with a = sqrt(5) over fan-in 2D, as torch initialises its linears.
            bound = 1 / math.sqrt(2 * in_width)
            uniform = dict(
                shape=(in_width, experts), dtype=param_dtype, minval=-bound, maxval=bound
            )
            self.gate_x = nnx.Param(jax.random.uniform(rngs.params(), **uniform))
            self.gate_task = nnx.Param(jax.random.uniform(rngs.params(), **uniform))
        else:
            self.gate_x = self.gate_task = None

    def __call__(
        self, x_BLD: Float[Array, "B L D"], task_BD: Float[Array, "B D"] | None
    ) -> Float[Array, "B L O"]:
        """The delta, in x's dtype."""
        gate = None
        if self.gate_x is not None and self.gate_task is not None:
            if task_BD is None:
                raise ValueError("these adapters route by task: pass a task embedding")
            scores = gate_scores(x_BLD, task_BD, self.gate_x[...], self.gate_task[...])
            gate = top_k_gate(scores, self.top_k)
        if self.dropout and self.drop_key is not None:
            x_BLD = drop_inputs(x_BLD, self.dropout, self.drop_key)
        y = moe_lora(x_BLD, self.down[...], self.up[...], gate, top_k=self.top_k, form=self.form)
        return y if self.scale == 1 else y * self.scale
