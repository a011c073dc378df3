"""Full training of a FLUX.1, of any size from scratch or further.

    python -m x2jax.train --config configs/pretrain.py
        A FLUX of the tiny family's size from scratch, on captions of its world, on CPU.
    python -m x2jax.train --config configs/pretrain.py:further --config.flux=DIR \
        --config.data='pictures/*.tar'
        A given FLUX further at 1024 px, read by T5 and CLIP. Adam's moments of 12 B parameters
        take 96 GB over all chips, Adafactor's far less: `--config.optimizer.name=adafactor`.

`--config.scratch=True` and `--config.model.*` say the sizes of a new one.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import common
from x2jax.flux import FLUX_TINY


def get_config(arg: str = "") -> ConfigDict:
    """The config of a stage: "" or "tiny", "further"."""
    if arg not in ("", "tiny", "further"):
        raise ValueError(f"unknown stage {arg!r}: use configs/pretrain.py or :further")
    c = common.defaults("pretrain", learning_rate=1e-5, warmup=1000)
    c.scratch = arg != "further"
    c.model = ConfigDict(dataclasses.asdict(FLUX_TINY))  # read if from scratch
    c.trainable = (r"flux/.*",)
    c.guidance = (1.0, 5.0)  # range of the scales in training, for a base with their embedder
    c.objective.density = "logit_normal"
    c.text.encoders = "t5+clip"
    c.image.update(slots=1, layout="pictures")
    c.ema_decay = 0.999
    if c.scratch:
        common.tiny(c)
        c.text.encoders = "mllm"
        c.steps = 4000
        c.batch_size = 32
    else:
        common.large(c)
    return c.lock()
