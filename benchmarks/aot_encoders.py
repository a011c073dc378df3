"""Memory of Qwen2.5-VL-7B's passes, compiled for TPUs that are not here.

    python -m benchmarks.aot_encoders --topology v5e:2x4 --batch 8

text      every hidden state of 512 tokens
vision    the tower over 5,120 patches a sample: one picture of a megapixel, or several small ones
generate  128 tokens after a prompt of 512, with every hidden state of theirs
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from x2jax import plan, sharding
from x2jax.encoders.generate import generate
from x2jax.encoders.qwen2_5_vl import (
    QWEN2_5_VL_7B,
    QWEN2_5_VL_7B_VISION,
    Qwen2_5_VL,
    VisionInputs,
)
from x2jax.trees import Skeleton, prefixed

MIB = 1 << 20
PASSES = ("text", "vision", "generate")


def compiled(mesh: Any, name: str, *, batch: int, tokens: int, patches: int, count: int) -> Any:
    """The compiled pass; weights in bfloat16, sharded over fsdp as the batch is."""
    bf16 = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    vision = QWEN2_5_VL_7B_VISION if name == "vision" else None
    skeleton = Skeleton(
        nnx.eval_shape(lambda: Qwen2_5_VL(QWEN2_5_VL_7B, vision, **bf16, rngs=nnx.Rngs(0)))
    )
    places = sharding.param_shardings(prefixed(skeleton.abstract, "mllm"), mesh)
    if name == "vision":
        skeleton = Skeleton(skeleton.merge(skeleton.abstract).visual)
        places = {p.replace("mllm/visual/", "mllm/"): x for p, x in places.items() if "visual" in p}
    params = {
        p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[f"mllm/{p}"])
        for p, x in skeleton.abstract.items()
    }

    def of(dtype, *shape):
        return jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=sharding.batch_sharding(mesh))

    if name == "vision":
        merged = patches // QWEN2_5_VL_7B_VISION.merge**2
        inputs: Any = VisionInputs(
            of(jnp.float32, patches, QWEN2_5_VL_7B_VISION.patch_width),
            of(jnp.int32, patches, 2),
            of(jnp.int32, patches),
            of(jnp.int32, patches),
            of(jnp.int32, merged),
        )
    else:
        inputs = (of(jnp.int32, tokens), of(jnp.bool_, tokens))

    def run(params, inputs):
        model = skeleton.merge(params)
        if name == "vision":
            return model(inputs)
        if name == "text":
            return model.hidden_states(*inputs)
        return generate(model, *inputs, count=count, eos=(151645, 151643))

    with jax.set_mesh(mesh):
        return jax.jit(run).lower(params, inputs).compile()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--batch", type=int, default=8, help="over all chips")
    parser.add_argument("--tokens", type=int, default=512, help="of a prompt")
    parser.add_argument("--patches", type=int, default=5120, help="a sample, a multiple of 4")
    parser.add_argument("--count", type=int, default=128, help="tokens to generate")
    parser.add_argument("--only", nargs="+", choices=PASSES, default=PASSES)
    args = parser.parse_args(argv)
    mesh = plan.topology_mesh(args.topology, {"fsdp": -1})
    sizes = dict(batch=args.batch, tokens=args.tokens, patches=args.patches, count=args.count)
    print(f"{mesh.devices.size} x {mesh.devices.flat[0].device_kind}, {sizes}; MiB a chip")
    print(f"{'':10}{'arguments':>12}{'temporary':>12}{'peak':>12}{'compiled in':>14}")
    for name in args.only:
        began = time.monotonic()
        m = compiled(mesh, name, **sizes).memory_analysis()
        parts = (m.argument_size_in_bytes, m.temp_size_in_bytes, m.peak_memory_in_bytes)
        print(
            f"{name:10}" + "".join(f"{x / MIB:12.0f}" for x in parts)
            + f"{time.monotonic() - began:12.0f} s", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
