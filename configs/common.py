"""What the configs of all recipes share. Not a config itself."""

from typing import Any

from ml_collections import ConfigDict

from x2jax import optim

X2I = dict(schedule="cosine", warmup=100, adamw=dict(weight_decay=1e-2))
"""How X2I trains AlignNet and LightControl, but for the learning rate (spec x2i.md section 2)."""


def run(recipe: str, **optimizer: Any) -> ConfigDict:
    """What every recipe has, at full size; `optimizer` changes AdamW's."""
    c = ConfigDict()
    c.recipe = recipe
    c.seed = 0

    # Where things come from: folders in the public layouts, or "tiny" for the embedded family.
    c.flux = ""  # diffusers folder: transformer/, vae/, and where needed encoders and tokenizers
    c.mllm = ""  # transformers folder of Qwen2.5-VL
    c.data = ""  # glob of data files, or "tiny:N" for N samples of the tiny world
    c.init_from = ""  # another run's workdir, to start from its trainable tree

    # Batch: `batch_size` samples a micro-batch over all devices, `accumulate` of them a step.
    c.batch_size = 8
    c.accumulate = 1
    c.steps = 100_000
    c.log_every = 10
    c.checkpoint_every = 1000
    c.keep = 2
    c.sample_every = 1000
    c.held_out = 16

    c.optimizer = ConfigDict(optim.defaults(**optimizer))
    c.ema_decay = 0.0  # 0 keeps no average
    c.precision = ConfigDict(dict(compute="bfloat16", frozen="bfloat16"))
    c.remat = "full"
    c.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1, expert=1))
    c.preview = ConfigDict(dict(steps=28, guidance=3.5, shift=True))
    return c


def defaults(recipe: str, **optimizer: Any) -> ConfigDict:
    """A flow-matching config of full size that lacks only what its recipe adds."""
    c = run(recipe, **optimizer)
    c.alignnet = ""  # AlignNet file or folder
    c.features = ""  # folder of x2jax.precompute; default features/ in the workdir, if it is there
    c.objective = ConfigDict(
        dict(
            density="uniform",
            guidance=1.0,
            contrastive=0.0,
            temperature=0.5,
            stop_gradient=True,
            source_offset=64,
            tokens=2048,
        )
    )
    c.text = ConfigDict(dict(length=512, template="raw", language="mixed"))
    # Whether the MLLM reads an instruction together with the sample's sources, `edge` px a side.
    c.text.update(pictures=False, edge=128)
    c.image = ConfigDict(dict(buckets="512", slots=2))
    c.sampler = ConfigDict(dict(alpha=0.0))
    c.workers = 8
    return c


def large(c: ConfigDict) -> None:
    """1024 px: one program for the 13 aspect ratios of X2Edit."""
    c.image.buckets = "1024"
    c.objective.source_offset = 128
    c.objective.tokens = 4096 * c.image.slots


def tiny_run(c: ConfigDict) -> None:
    """The embedded family, in minutes on CPU."""
    c.flux = c.mllm = "tiny"
    c.steps = 600
    c.checkpoint_every = c.sample_every = 200
    c.text.length = 64
    c.optimizer.learning_rate = 2e-3
    c.optimizer.warmup = 20
    c.precision.update(compute="float32", frozen="float32")
    c.remat = "none"
    c.preview.steps = 16


def tiny(c: ConfigDict) -> None:
    """The embedded family on edits of its procedural world."""
    tiny_run(c)
    c.alignnet = "tiny"
    c.data = "tiny:4096"
    c.batch_size = 16
    c.objective.update(source_offset=16, tokens=64 * c.image.slots)
    c.image.buckets = "tiny"
    c.text.edge = 64
    c.workers = 0
