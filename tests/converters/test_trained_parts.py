"""What runs trained besides adapters comes out in the format of its own, bitwise."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import pretrain
from converters.exporting import export
from converters.formats import FORMATS
from converters.importing import open_parts
from x2jax.alignnet import AlignNet, AlignNetConfig
from x2jax.checkpoint import Checkpointer
from x2jax.control import ControlConfig, LightControl
from x2jax.flux import FLUX_TINY, Flux
from x2jax.state import TrainState
from x2jax.trees import Skeleton, prefixed

F32 = dict(dtype=jnp.float32, param_dtype=jnp.float32)
FLUX = dataclasses.replace(
    FLUX_TINY, width=16, heads=1, head_dim=16, axes=(4, 6, 6), double_blocks=2, single_blocks=1
)
NETS = ControlConfig((4, 6, 8), (8,), (4,), time_features=12, time_width=10)
MADE = {
    "alignnet": ("alignnet", lambda r: AlignNet(AlignNetConfig(5, 12, 20, 6), **F32, rngs=r)),
    "lightcontrol": ("control", lambda r: LightControl(NETS, FLUX, **F32, rngs=r)),
    "flux-diffusers": ("flux", lambda r: Flux(FLUX, **F32, rngs=r)),
}


def make_run(root, name):
    """A workdir with one checkpoint of random parameters; they are returned too."""
    child, make = MADE[name]
    rng = np.random.default_rng(0)
    abstract = Skeleton(nnx.eval_shape(lambda: make(nnx.Rngs(0)))).abstract
    params = {p: rng.standard_normal(x.shape).astype(np.float32) for p, x in abstract.items()}
    config = pretrain.get_config().unlock()
    config.model.update(dataclasses.asdict(FLUX))
    saver = Checkpointer(root, every=1, keep=1)
    state = TrainState(np.int32(1), jax.tree.map(jnp.asarray, prefixed(params, child)), {}, {})
    saver.save(1, state, {"config": json.loads(config.to_json())}, force=True)
    saver.close()
    return params


@pytest.mark.parametrize("name", MADE)
def test_a_run_is_written_in_its_own_format(name, tmp_path):
    params, fmt = make_run(tmp_path / "run", name), FORMATS[name]
    export(tmp_path / "run", fmt, tmp_path / "out", dtype="float32")
    ((_, found),) = open_parts(tmp_path / "out", fmt, fmt.read(tmp_path / "out"))
    assert found.specs.keys() == params.keys()
    for path, x in params.items():
        np.testing.assert_array_equal(found(path), x, err_msg=path)


def test_what_a_run_did_not_train_is_refused(tmp_path):
    make_run(tmp_path / "run", "alignnet")
    with pytest.raises(ValueError, match=r"trained alignnet: .* be written as flux-diffusers"):
        export(tmp_path / "run", FORMATS["flux-diffusers"], tmp_path / "out")
