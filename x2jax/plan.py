"""Compiles a config's step for devices that are not here, and says whether it fits.

    python -m x2jax.plan --config configs/x2edit.py:1024 --topology v5e:2x4 --config.batch_size=8

`--features` plans the step of a run that reads what `x2jax.precompute` makes of the same config.
Needs libtpu (pip install 'x2jax[tpu]') and no TPU. Architectures come from the folders that the
config names; without any, the published ones are planned: no weights are read either way.
"""

import os
import time
from typing import Any, NamedTuple

import jax
from absl import app, flags
from jax.sharding import Mesh
from ml_collections import config_flags

from x2jax import optim, recipes, sharding
from x2jax import state as states
from x2jax.step import make_step

GIB = 1 << 30
HBM = {"TPU v4": 32, "TPU v5 lite": 16, "TPU v5": 95, "TPU v6 lite": 32, "TPU7x": 192}
"""Memory of a chip in GiB by JAX's device kind, as Google Cloud documents it."""


class Plan(NamedTuple):
    """Memory of one device in bytes.

    Attributes:
      arguments: state, frozen weights and batch.
      temporary: of the step itself.
      peak: the compiler's own figure, arguments included.
      available: of this kind of device; None where it is not known.
      seconds: that compiling took.
      without: children that are not in the step, computed before.
    """

    arguments: int
    temporary: int
    peak: int
    available: int | None
    seconds: float
    without: tuple[str, ...] = ()

    @property
    def fits(self) -> bool | None:
        """Whether the peak is below what there is; None where that is not known."""
        return None if self.available is None else self.peak <= self.available


def topology_mesh(name: str, axes: Any) -> Mesh:
    """A mesh over the devices of a TPU topology such as "v5e:2x4".

    Raises:
      ValueError: libtpu is absent or knows no such topology.
    """
    from jax.experimental import topologies

    # libtpu would ask a metadata server what it runs on; here it only compiles.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as e:  # libtpu raises several kinds
        raise ValueError(
            f"--topology={name}: {str(e).splitlines()[0]}. Topologies are named as v5e:2x4, "
            "v5p:2x2x1, v6e:4x4; libtpu comes with pip install 'x2jax[tpu]'"
        ) from None
    return sharding.make_mesh(axes, devices)


def plan(config: Any, mesh: Mesh, features: bool = False) -> Plan:
    """Compiles one optimizer step of a config for a mesh, from shapes alone.

    Args:
      features: whether it reads what `x2jax.precompute` makes, and nothing of what made that.

    Raises:
      ValueError: features for a recipe that reads none.
    """
    recipe = recipes.outline(config)
    if features:
        recipe = recipe.from_features()
    tx = optim.build(steps=config.steps, **config.optimizer)
    by_path = sharding.param_shardings(recipe.skeleton.abstract, mesh)
    trainable = recipe.trainable_abstract
    frozen = {p: x for p, x in recipe.skeleton.abstract.items() if p not in trainable}
    state = jax.eval_shape(lambda p: states.create(p, tx, config.ema_decay > 0), trainable)
    placed = states.shardings(state, by_path, mesh)
    batches = sharding.batch_sharding(mesh, None)

    def put(x, where):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    arguments = (
        jax.tree.map(put, state, placed),
        {p: put(x, by_path[p]) for p, x in frozen.items()},
        jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                (config.accumulate, *x.shape), x.dtype, sharding=batches
            ),
            recipe.batch(),
        ),
    )
    step = make_step(recipe.loss, tx, seed=config.seed, ema_decay=config.ema_decay)
    began = time.monotonic()
    with jax.set_mesh(mesh):
        compiled = jax.jit(step, donate_argnums=0).lower(*arguments).compile()
    memory: Any = compiled.memory_analysis()
    available = HBM.get(mesh.devices.flat[0].device_kind)
    return Plan(
        arguments=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        available=None if available is None else available * GIB,
        seconds=time.monotonic() - began,
        without=recipe.without,
    )


def report(config: Any, mesh: Mesh, found: Plan) -> str:
    """A plan as a user reads it."""
    kind, count = mesh.devices.flat[0].device_kind, mesh.devices.size
    room = "unknown" if found.available is None else f"{found.available / GIB:.0f} GiB"
    names = ", ".join(found.without)
    before = f"  features     stand for {names}\n" if names else ""
    verdict = {True: "fits", False: "DOES NOT FIT", None: "compare with your device"}[found.fits]
    return (
        f"{count} x {kind}, mesh {dict(mesh.shape)}\n"
        f"  batch        {config.batch_size} a micro-batch, {config.accumulate} a step\n"
        f"{before}"
        f"  arguments    {found.arguments / GIB:6.2f} GiB a chip: state, frozen weights, batch\n"
        f"  temporary    {found.temporary / GIB:6.2f} GiB a chip\n"
        f"  peak         {found.peak / GIB:6.2f} GiB a chip, of {room}: {verdict}\n"
        f"  compiled in  {found.seconds:.0f} s"
    )


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    config, topology = flags.FLAGS.config, flags.FLAGS.topology
    axes = config.mesh
    mesh = topology_mesh(topology, axes) if topology else sharding.make_mesh(axes)
    print(report(config, mesh, plan(config, mesh, flags.FLAGS.features)))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Training config, as FILE.py[:ARG].")
    flags.DEFINE_string("topology", "", "TPU topology, as v5e:2x4; default: the devices here.")
    flags.DEFINE_bool("features", False, "Plan a step that reads what x2jax.precompute makes.")
    flags.mark_flag_as_required("config")
    app.run(main)
