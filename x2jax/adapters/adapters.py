"""All adapters of a FLUX.1, stacked as its blocks are, and the task table."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from x2jax.adapters.config import AdapterConfig
from x2jax.adapters.moe_lora import MoELoRA
from x2jax.flux.config import FluxConfig
from x2jax.flux.model import stack


class TaskTable(nnx.Module):
    """One embedding a task, drawn from N(0, 1)."""

    def __init__(self, tasks: int, width: int, *, param_dtype, rngs: nnx.Rngs):
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (tasks, width), param_dtype))

    def __call__(self, task_B: Int[Array, "B"]) -> Float[Array, "B D"]:
        return jnp.take(self.embedding[...], task_B, axis=0)


class Adapters(nnx.Module):
    """The trainable set beside a frozen `Flux`; pass it to `Flux.__call__`.

    Attributes:
      double_blocks, single_blocks: module name -> projection name -> `MoELoRA`, parameters stacked
        over the blocks; None where nothing of that kind is adapted.
      task_table: task id -> embedding; None without routed experts.
    """

    def __init__(
        self, cfg: AdapterConfig, flux: FluxConfig, *, param_dtype=jnp.float32, rngs: nnx.Rngs
    ):
        self.cfg = cfg

        def adapter(path, rngs):
            return MoELoRA(
                flux.mlp_width if path.endswith("mlp_out") else flux.width,
                flux.mlp_width if path.endswith("mlp_in") else flux.width,
                experts=cfg.experts,
                rank=cfg.rank,
                top_k=cfg.top_k,
                scale=cfg.scale,
                series=path in cfg.series,
                form=cfg.form,
                dropout=cfg.dropout,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        def build(paths, count):
            if not paths:
                return None

            def block(rngs):
                modules = dict.fromkeys(p.split("/")[0] for p in paths)
                return nnx.Dict(
                    {
                        m: nnx.Dict(
                            {
                                p.split("/")[1]: adapter(p, rngs)
                                for p in paths
                                if p.startswith(m + "/")
                            }
                        )
                        for m in modules
                    }
                )

            return stack(block, count, rngs)

        self.double_blocks = build(cfg.double, flux.double_blocks)
        self.single_blocks = build(cfg.single, flux.single_blocks)
        self.task_table = (
            TaskTable(cfg.tasks, flux.width, param_dtype=param_dtype, rngs=rngs)
            if cfg.tasks
            else None
        )

    def drop(self, key: PRNGKeyArray) -> None:
        """Switches dropout on, with a key for every projection of every block.

        In place: for a module that was merged inside a step, and ends with it.
        """
        if not self.cfg.dropout:
            return
        projections = [
            adapter
            for blocks in (self.double_blocks, self.single_blocks)
            for _, module in sorted((blocks or {}).items())
            for _, adapter in sorted(module.items())
        ]
        for n, adapter in enumerate(projections):
            # The blocks' scan hands each block its row, as it does with the parameters.
            keys = jax.random.split(jax.random.fold_in(key, n), adapter.down.shape[0])
            adapter.drop_key = nnx.data(keys)

    def task(self, task_B: Int[Array, "B"]) -> Float[Array, "B D"] | None:
        """Task embeddings, or None for adapters that do not route."""
        return None if self.task_table is None else self.task_table(task_B)
