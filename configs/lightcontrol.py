"""LightControl of X2I (arXiv 2503.06134): conv nets that show a frozen FLUX.1 the source.

    python -m x2jax.train --config configs/lightcontrol.py
        The tiny family and its procedural world, on CPU, in minutes.
    python -m x2jax.train --config configs/lightcontrol.py:1024 --config.flux=DIR \
        --config.mllm=DIR --config.alignnet=FILE --config.data='X2Edit_data/*/*/*.tar'
        X2I's second stage: 1e-5, batches of 1 x 8 a device, guidance 3.5, logit-normal timesteps.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    """The config of a stage: "" or "tiny", "1024"."""
    if arg not in ("", "tiny", "1024"):
        raise ValueError(f"unknown stage {arg!r}: use configs/lightcontrol.py or :1024")
    c = common.defaults("lightcontrol", learning_rate=1e-5, **common.X2I)
    c.trainable = (r"control/.*",)
    c.text.pictures = True
    c.control = ConfigDict(
        dict(
            stem=(64, 64, 128),
            widths=(128, 256),
            groups=(4, 8),
            time_features=128,
            time_width=256,
            zero=True,
        )
    )
    c.objective.update(density="logit_normal", guidance=3.5)
    if arg == "1024":
        common.large(c)
        c.accumulate = 8
    else:
        common.tiny(c)
        c.text.length = 96  # of which the source takes some
        c.control.update(stem=(16, 16, 32), widths=(32,), groups=(4,), time_width=64)
    c.objective.tokens //= 2  # of its two images the target alone becomes tokens
    return c.lock()
