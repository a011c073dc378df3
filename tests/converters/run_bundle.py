"""Runs a bundle with whatever diffusers and transformers `PYTHONPATH` has first; no x2jax here.

    PYTHONPATH=FOLDER python tests/converters/run_bundle.py CASE

CASE has `bundle`, `base` (a diffusers folder), `qwen`, `lora.safetensors` (an ordinary LoRA) and
`case.safetensors` (`noise`, `source`; settings in its header). Writes `result.safetensors`: latents
with the adapter, with the LoRA beside it, and after the LoRA was unloaded.
"""

import json
import sys
from pathlib import Path

import diffusers
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def open_qwen(folder: Path):
    """Model and tokenizer of the tiny family, which is stored as transformers 5 does it."""
    config = json.loads((folder / "config.json").read_text())
    if int(transformers.__version__.split(".")[0]) < 5:
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope["rope_theta"]
        config["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    config["vision_config"] = {
        "depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16,
        "out_hidden_size": 16,
    }  # fmt: skip
    model = transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(**config))
    text = getattr(model.model, "language_model", model.model)
    tensors = {  # the text alone: an edit shows Qwen no picture
        n: x
        for n, x in load_file(folder / "model.safetensors").items()
        if ".visual." not in n and not n.startswith(("visual.", "lm_head."))
    }
    heads = ("model.language_model.", "model.")
    named = {
        n.removeprefix(next(h for h in heads if n.startswith(h))): x for n, x in tensors.items()
    }
    text.load_state_dict(named)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        pad_token="<|endoftext|>", eos_token="<|im_end|>",
        chat_template=(folder / "chat_template.jinja").read_text(),
    )  # fmt: skip
    return {"mllm": model.eval(), "mllm_tokenizer": tokenizer}


def main(case: Path) -> None:
    torch.set_num_threads(1)
    with safe_open(case / "case.safetensors", "pt") as f:
        asked = json.loads(f.metadata()["call"])
        noise, source = f.get_tensor("noise"), f.get_tensor("source")
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        str(case / "base"), custom_pipeline=str(case / "bundle"), adapter=str(case / "bundle"),
        trust_remote_code=True, **open_qwen(case / "qwen"),
    )  # fmt: skip

    pipe.encode = lambda *_: source
    image = Image.new("RGB", (64, 64))

    def latents():
        return pipe(**asked, image=image, latents=noise, output_type="latent").images

    alone = latents()
    pipe.load_lora_weights(str(case / "lora.safetensors"), adapter_name="other")
    beside = latents()
    pipe.unload_lora_weights()
    result = {"alone": alone, "beside": beside, "after": latents()}
    save_file(result, case / "result.safetensors", metadata={"at": diffusers.__file__})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
