"""X2I (arXiv 2503.06134): AlignNet, distilled from T5 + CLIP through a frozen FLUX.1.

    python -m x2jax.train --config configs/alignnet.py
        The tiny family on captions of its procedural world, on CPU.
    python -m x2jax.train --config configs/alignnet.py:7b --workdir RUN \
        --config.flux=DIR --config.mllm=DIR --config.data='captions/*.jsonl'
        Qwen2.5-VL-7B, 57,000 steps; :3b is Qwen2.5-VL-3B, 13,000 steps.

100,000 English sentences suffice; the releases took 160 GPU hours (spec x2i.md section 2).
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    """The config of an MLLM: "" or "tiny", "7b", "3b"."""
    if arg not in ("", "tiny", "7b", "3b"):
        raise ValueError(f"unknown MLLM {arg!r}: use configs/alignnet.py, :7b or :3b")
    c = common.run("alignnet", learning_rate=1e-4, **common.X2I)
    # `data` is globs of captions, with commas between.
    c.released = "qwen2.5-vl-7b"  # whose AlignNet (x2jax/alignnet.py); "": one that fits the MLLM
    c.captions = ConfigDict(dict(key="caption"))  # JSON key, tar suffix or parquet column
    c.trainable = (r"alignnet/.*",)
    c.objective = ConfigDict(
        dict(
            size=1024,
            guidance=3.5,
            temperature=3.0,
            direction="student_teacher",
            text_weight=1.0,
            segment=8,
        )
    )
    c.text = ConfigDict(dict(length=512, template="raw"))
    c.steps = 57_000
    if arg == "3b":
        c.released = "qwen2.5-vl-3b"
        c.steps = 13_000
    elif arg != "7b":
        common.tiny_run(c)
        c.data = "tiny:20000"
        c.released = ""
        c.objective.size = 64
        # 64 tokens of image and of text, where FLUX has 4096 and 512: text is to count as little.
        c.objective.text_weight = 1 / 8
        c.optimizer.learning_rate = 4e-3
    return c.lock()
