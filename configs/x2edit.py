"""X2Edit (arXiv 2508.07607): an instruction-editing adapter on a frozen FLUX.1.

    python -m x2jax.train --config configs/x2edit.py
        The tiny family and its procedural world, on CPU, in minutes.
    python -m x2jax.train --config configs/x2edit.py:512 --config.flux=DIR --config.mllm=DIR \
        --config.alignnet=FILE --config.data='X2Edit_data/*/*/*.tar'
        The paper's first stage: MoE-LoRA, task table and AlignNet.
    python -m x2jax.train --config configs/x2edit.py:1024 ... --config.init_from=RUN_OF_512
        Its second stage, AlignNet frozen. One program serves all 13 aspect ratios.

Published: GEdit-Bench++ EN judge 8.334, ImgEdit-Bench 8.025 (spec x2edit.md section 7).
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    """The config of a stage: "" or "tiny", "512", "1024"."""
    if arg not in ("", "tiny", "512", "1024"):
        raise ValueError(f"unknown stage {arg!r}: use configs/x2edit.py, :512 or :1024")
    c = common.defaults("x2edit", learning_rate=1e-4)
    c.trainable = (r"adapter/.*", r"alignnet/.*")
    c.adapter = ConfigDict(dict(experts=12, rank=64, alpha=64.0, top_k=2, form="static"))
    c.objective.contrastive = 0.2

    if arg == "512":
        c.batch_size = 96  # 12 a device, 8 devices
    elif arg == "1024":
        c.batch_size = 32  # 4 a device, 8 devices
        c.trainable = (r"adapter/.*",)
        common.large(c)
    else:
        common.tiny(c)
        c.adapter.update(experts=4, rank=16, alpha=16.0)
    return c.lock()
