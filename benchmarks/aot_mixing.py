"""Memory of AlignNet's two ways to mix hidden states, compiled for TPUs that are not here.

    python -m benchmarks.aot_mixing --topology v5e:2x4 --batch 8

Qwen2.5-VL-7B and AlignNet alone, 512 tokens: at inference, and with the gradient of AlignNet.
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from x2jax import plan, sharding
from x2jax.alignnet import AlignNet, AlignNetConfig
from x2jax.encoders.qwen2_5_vl import QWEN2_5_VL_7B, Qwen2_5_VL
from x2jax.trees import Skeleton

MIB = 1 << 20


class Pair(nnx.Module):
    """The language model and its AlignNet, by the names of the parameter paths."""

    def __init__(self):
        cfg, rngs = QWEN2_5_VL_7B, nnx.Rngs(0)
        bf16 = jnp.bfloat16
        self.mllm = Qwen2_5_VL(cfg, dtype=bf16, param_dtype=bf16, rngs=rngs)
        self.alignnet = AlignNet(
            AlignNetConfig(cfg.states, cfg.width), dtype=bf16, param_dtype=jnp.float32, rngs=rngs
        )

    def __call__(self, ids, mask, form):
        if form == "stacked":
            return self.alignnet(jax.lax.stop_gradient(self.mllm.hidden_states(ids, mask)))
        return self.alignnet.condition(self.mllm, ids, mask)


def condition(mesh: Any, batch: int, tokens: int, form: str, training: bool) -> Any:
    """Memory of one pass on one chip, with or without the gradient of AlignNet."""
    skeleton = Skeleton(nnx.eval_shape(Pair))
    places = sharding.param_shardings(skeleton.abstract, mesh)
    put = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)  # noqa: E731
    shapes = {p: put(x, places[p]) for p, x in skeleton.abstract.items()}
    params = {p: x for p, x in shapes.items() if p.startswith("alignnet/")}
    frozen = {p: x for p, x in shapes.items() if p not in params}
    rows = sharding.batch_sharding(mesh)
    ids = jax.ShapeDtypeStruct((batch, tokens), jnp.int32, sharding=rows)
    mask = jax.ShapeDtypeStruct((batch, tokens), jnp.bool_, sharding=rows)

    def run(params, frozen, ids, mask):
        return skeleton.merge(params, frozen)(ids, mask, form)

    def loss(*arguments):
        out = run(*arguments)
        return sum(jnp.square(x.astype(jnp.float32)).mean() for x in out)

    with jax.set_mesh(mesh):
        traced = jax.jit(jax.value_and_grad(loss) if training else run)
        return traced.lower(params, frozen, ids, mask).compile().memory_analysis()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--batch", type=int, default=8, help="over all chips")
    parser.add_argument("--tokens", type=int, default=512)
    args = parser.parse_args()
    mesh = plan.topology_mesh(args.topology, {"fsdp": -1})
    print(f"{mesh.devices.size} x {mesh.devices.flat[0].device_kind}, {args.batch} samples of "
          f"{args.tokens} tokens; MiB a chip")  # fmt: skip
    print(f"{'':24}{'arguments':>12}{'temporary':>12}{'peak':>12}{'compiled in':>14}")
    for training in (False, True):
        for form in ("stacked", "as they appear"):
            began = time.monotonic()
            m = condition(mesh, args.batch, args.tokens, form, training)
            sizes = (m.argument_size_in_bytes, m.temp_size_in_bytes, m.peak_memory_in_bytes)
            name = f"{'training' if training else 'inference'}, {form}"
            print(f"{name:26}" + "".join(f"{x / MIB:10.0f}  " for x in sizes)
                  + f"{time.monotonic() - began:10.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
