"""Plain LoRA on a frozen FLUX.1, for diffusers and ComfyUI.

    python -m x2jax.train --config configs/lora.py
        Edits of the tiny world by the tiny family, on CPU, in minutes; `:pictures` its captions.
    python -m x2jax.train --config configs/lora.py:1024 --config.flux=DIR --config.mllm=DIR \
        --config.alignnet=FILE --config.data='X2Edit_data/*/*/*.tar'
        Edits, read by Qwen2.5-VL and AlignNet: the source is a second image in the stream.
    python -m x2jax.train --config configs/lora.py:pictures-1024 --config.flux=DIR \
        --config.data='pictures/*.tar'
        Text to image, read by T5 and CLIP of the FLUX folder. Shards are plain WebDataset
        (`KEY.jpg` with `KEY.txt` or `KEY.json`), or X2Edit's: their targets and captions.

`--config.text.encoders` changes the reader, `--config.adapter.preset` what is adapted: attention,
attention+mlp or all. `python -m converters export --from RUN --format lora-peft --out DIR` writes
what diffusers and ComfyUI load.
"""

from ml_collections import ConfigDict

from configs import common

STAGES = ("", "pictures", "1024", "pictures-1024")


def get_config(arg: str = "") -> ConfigDict:
    """The config of a stage, one of `STAGES`."""
    if arg not in STAGES:
        raise ValueError(f"unknown stage {arg!r}: use configs/lora.py:{', :'.join(STAGES[1:])}")
    c = common.defaults("lora", learning_rate=1e-4, warmup=100, adamw=dict(weight_decay=1e-2))
    pictures = arg.startswith("pictures")
    c.trainable = (r"adapter/.*",)
    c.adapter = ConfigDict(dict(preset="attention", rank=16, alpha=16.0, dropout=0.0))
    c.objective.density = "logit_normal"
    c.text.encoders = "t5+clip" if pictures else "mllm"
    c.image.update(slots=1 if pictures else 2, layout="pictures" if pictures else "edits")
    c.steps = 4000
    if "1024" in arg:
        common.large(c)
    else:
        common.tiny(c)
    return c.lock()
