"""Memory of distilling in lockstep, against keeping the teacher's tensors; compiled ahead of time.

    python -m benchmarks.lockstep_memory                       # v5p:2x2x1 and v5e:4x4
    python -m benchmarks.lockstep_memory --topology v5p:2x2x1 --segment 8

FLUX.1-dev in bfloat16, 4096 image and 512 text tokens, one sample a chip, FSDP, full remat: loss
and gradient with respect to AlignNet's outputs. Three programs:

  plain      the student alone: a loss on its velocity, no teacher and no distillation term
  stored     the teacher's tensors of every block are kept for the backward pass (1.61 GB a sample)
  lockstep   both are kept at every `--segment`-th block alone, and computed again

"Extra" is a program's temporary memory beyond that of `plain`: all that the teacher and the terms
cost. Needs libtpu (pip install 'x2jax[tpu]') and no TPU; a program takes minutes to compile.
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from x2jax import distill, plan, sharding
from x2jax.flux import FLUX_DEV, Flux, ImageStream
from x2jax.trees import Skeleton, child, prefixed

IMAGE, TEXT = 4096, 512
MIB = 1 << 20


def make_loss(skeleton: Skeleton, segment: int | None):
    """Loss of a student's condition; `segment` None is `plain`, 0 `stored`."""

    def loss(student, teacher, frozen, img):
        model: Flux = skeleton.merge(frozen)
        batch = img.roles_BI.shape[0]
        ones, guidance = jnp.ones(batch), jnp.full(batch, 3.5)
        if segment is None:
            out = model(img, *student, ones, guidance, remat="full")
            return jnp.square(out.velocity_BIC.astype(jnp.float32)).mean()
        probe = distill.DistillProbe(jnp.ones(img.roles_BI.shape, bool))
        seen = model.lockstep(
            img, teacher, student, ones, guidance, probe=probe, remat="full", segment=segment
        )
        return distill.distillation(seen).loss

    return loss


def temporary(mesh, segment: int | None) -> int:
    """Bytes of a chip beyond the arguments."""
    make = lambda: Flux(  # noqa: E731
        FLUX_DEV, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    skeleton = Skeleton(nnx.eval_shape(make))
    by_path = child(sharding.param_shardings(prefixed(skeleton.abstract, "flux"), mesh), "flux")
    where, batch = sharding.batch_sharding(mesh), mesh.devices.size

    def array(dtype: Any, *shape: int):
        return jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=where)

    condition = (
        array(jnp.float32, TEXT, FLUX_DEV.text_width),
        array(jnp.float32, FLUX_DEV.pooled_width),
    )
    img = ImageStream(
        array(jnp.float32, IMAGE, FLUX_DEV.channels),
        array(jnp.int32, IMAGE),
        array(jnp.int32, IMAGE, 3),
    )
    frozen = {
        p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_path[p])
        for p, x in skeleton.abstract.items()
    }
    step = jax.value_and_grad(make_loss(skeleton, segment))
    with jax.set_mesh(mesh):
        compiled = jax.jit(step).lower(condition, condition, frozen, img).compile()
    memory: Any = compiled.memory_analysis()
    return memory.peak_memory_in_bytes - memory.argument_size_in_bytes


def compare(topology: str, segment: int) -> float:
    """Prints the three programs; returns lockstep's extra memory as a share of stored's."""
    mesh = plan.topology_mesh(topology, {"fsdp": -1})
    device = mesh.devices.flat[0].device_kind
    print(f"{topology}: {mesh.devices.size} x {device}, one sample a chip, peak beyond arguments")
    found = {}
    for name, how in (("plain", None), ("stored", 0), ("lockstep", segment)):
        began = time.monotonic()
        found[name] = temporary(mesh, how)
        extra = found[name] - found["plain"]
        seconds = time.monotonic() - began
        print(
            f"  {name:9} {found[name] / MIB:8.0f} MiB   extra {extra / MIB:6.0f} MiB"
            f"   compiled in {seconds:.0f} s",
            flush=True,
        )
    share = (found["lockstep"] - found["plain"]) / (found["stored"] - found["plain"])
    print(f"  lockstep (segments of {segment}) needs {share:.1%} of the extra memory of stored")
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", action="append", help="as v5p:2x2x1; may be repeated")
    parser.add_argument("--segment", type=int, default=8, help="blocks between two kept states")
    args = parser.parse_args()
    for topology in args.topology or ["v5p:2x2x1", "v5e:4x4"]:
        compare(topology, args.segment)


if __name__ == "__main__":
    main()
