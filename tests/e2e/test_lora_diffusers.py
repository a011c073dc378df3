"""A plain LoRA trained here, exported, in diffusers: every weight used, and the same velocity."""

import diffusers
import numpy as np
import pytest
import torch

from configs.lora import get_config
from converters import __main__ as cli
from converters.lora_peft import FILE
from tests.converters import loras
from x2jax import train
from x2jax.adapters import AdapterConfig
from x2jax.flux import FLUX_TINY
from x2jax.sources import TINY
from x2jax.trees import child


@pytest.mark.slow
def test_diffusers_loads_every_weight_and_gives_the_same_velocity(tmp_path):
    """All projections, a scale that is not 1, two steps far enough to see."""
    config = get_config("pictures").unlock()
    config.update(batch_size=4, held_out=4, data="tiny:96", steps=2, sample_every=9)
    config.adapter.update(preset="all", rank=3, alpha=4.5, dropout=0.1)
    config.optimizer.update(learning_rate=0.05, warmup=0)
    config.preview.steps = 1
    params = child(train.train(config.lock(), tmp_path / "run"), "adapter")
    command = ["export", "--from", str(tmp_path / "run"), "--format", "lora-peft"]
    assert cli.main([*command, "--out", str(tmp_path / "lora")]) == 0

    base = TINY / "flux" / "transformer"
    model = diffusers.FluxTransformer2DModel.from_pretrained(base, torch_dtype=torch.float32)
    without = loras.run_diffusers(model, FLUX_TINY)
    ours = loras.Ours(model, FLUX_TINY)
    adapted = loras.load_in_diffusers(model, tmp_path / "lora" / FILE, FLUX_TINY)
    # Single blocks fuse two of their six projections into one linear.
    assert len(adapted) == 12 * FLUX_TINY.double_blocks + 5 * FLUX_TINY.single_blocks
    theirs = loras.run_diffusers(model, FLUX_TINY)
    scale = np.abs(theirs).max()
    assert np.abs(theirs - without).max() > 1e-2 * scale
    found = ours(AdapterConfig.of(config.adapter), {p: np.asarray(x) for p, x in params.items()})
    np.testing.assert_allclose(found / scale, theirs / scale, atol=1e-4)
