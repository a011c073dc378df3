"""X2I (arXiv 2503.06134): AlignNet, distilled from T5 + CLIP through a frozen FLUX.1.

    python -m x2jax.train --config configs/alignnet.py
        The tiny family on captions of its procedural world, on CPU.
    python -m x2jax.train --config configs/alignnet.py:7b --workdir RUN \
        --config.flux=DIR --config.mllm=DIR --config.data='captions/*.jsonl'
        Qwen2.5-VL-7B, 57,000 steps; :3b is Qwen2.5-VL-3B, 13,000 steps.

100,000 English sentences suffice; the releases took 160 GPU hours (spec x2i.md section 2).
"""

from ml_collections import ConfigDict

from x2jax import optim


def get_config(arg: str = "") -> ConfigDict:
    """The config of an MLLM: "" or "tiny", "7b", "3b"."""
    if arg not in ("", "tiny", "7b", "3b"):
        raise ValueError(f"unknown MLLM {arg!r}: use configs/alignnet.py, :7b or :3b")
    c = ConfigDict()
    c.recipe = "alignnet"
    c.seed = 0

    # Where things come from: folders in the public layouts, or "tiny" for the embedded family.
    c.flux = ""  # diffusers folder with transformer/, vae/, text encoders and tokenizers
    c.mllm = ""  # transformers folder of Qwen2.5-VL
    c.data = ""  # globs of captions, with commas between, or "tiny:N" for N of the tiny world
    c.init_from = ""  # another run's workdir, to start from its AlignNet
    c.released = "qwen2.5-vl-7b"  # whose AlignNet (x2jax/alignnet.py); "": one that fits the MLLM
    c.captions = ConfigDict(dict(key="caption"))  # JSON key, tar suffix or parquet column

    # Batch: `batch_size` samples a micro-batch over all devices, `accumulate` of them a step.
    c.batch_size = 8
    c.accumulate = 1
    c.steps = 57_000
    c.log_every = 10
    c.checkpoint_every = 1000
    c.keep = 2
    c.sample_every = 1000
    c.held_out = 16

    c.trainable = (r"alignnet/.*",)
    c.objective = ConfigDict(
        dict(size=1024, guidance=3.5, temperature=3.0, direction="student_teacher", segment=8)
    )
    c.text = ConfigDict(dict(length=512, template="raw"))
    c.optimizer = ConfigDict(
        optim.defaults(
            learning_rate=1e-4, schedule="cosine", warmup=100, adamw=dict(weight_decay=1e-2)
        )
    )
    c.ema_decay = 0.0  # 0 keeps no average
    c.precision = ConfigDict(dict(compute="bfloat16", frozen="bfloat16"))
    c.remat = "full"
    c.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1, expert=1))
    c.preview = ConfigDict(dict(steps=28, guidance=3.5, shift=True))

    if arg == "3b":
        c.released = "qwen2.5-vl-3b"
        c.steps = 13_000
    elif arg != "7b":
        c.flux = c.mllm = "tiny"
        c.data = "tiny:20000"
        c.released = ""
        c.steps = 600
        c.checkpoint_every = c.sample_every = 200
        c.objective.size = 64
        c.text.length = 64
        c.optimizer.learning_rate = 2e-3
        c.optimizer.warmup = 20
        c.precision.update(compute="float32", frozen="float32")
        c.remat = "none"
        c.preview.steps = 16
    return c.lock()
