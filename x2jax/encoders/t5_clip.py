"""What T5 and CLIP read: prompts to token ids by the tokenizers of a diffusers FLUX folder."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Int32

CLIP_LENGTH = 77


class T5ClipInputs(NamedTuple):
    """Attributes: token ids for T5 and for CLIP, padded right."""

    t5_ids_BT: Int32[Array, "B T"]
    clip_ids_BS: Int32[Array, "B S"]


def _open(folder: Path, what: str):
    """The tokenizer of a folder.

    Raises:
      FileNotFoundError: no such folder. ValueError: it holds no tokenizer that can be read.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers fork
    from transformers import AutoTokenizer  # slow to import

    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is missing: {what} needs the whole diffusers folder of FLUX.1, with "
            "tokenizer/ and tokenizer_2/"
        )
    there = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
    if not any((folder / n).is_file() for n in ("tokenizer.json", "vocab.json", "spiece.model")):
        raise ValueError(
            f"no tokenizer in {folder}: it holds {there}, and needs tokenizer.json, or vocab.json "
            "with merges.txt, or spiece.model"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as e:  # a damaged file raises whatever its parser raises
        raise ValueError(f"no tokenizer could be loaded from {folder} ({there}): {e}") from None
    for token in ("pad_token_id", "eos_token_id"):
        if getattr(tokenizer, token) is None:
            raise ValueError(f"the tokenizer in {folder} has no {token.removesuffix('_id')}")
    return tokenizer


class T5ClipTokenizer:
    """Callable: prompts -> `T5ClipInputs`, as diffusers' FluxPipeline encodes them. Picklable.

    A prompt that does not fit is cut at its end; `truncated` counts these, for T5 and for CLIP.
    """

    def __init__(self, folder: str | Path, length: int = 512, clip_length: int = CLIP_LENGTH):
        """Opens `tokenizer_2/` (T5) and `tokenizer/` (CLIP) of a diffusers FLUX folder.

        Raises:
          FileNotFoundError: a folder is missing.
          ValueError: a tokenizer cannot be read or lacks its end or pad token, or a length leaves
            no room for a token.
        """
        if length < 2 or clip_length < 3:
            raise ValueError(f"{length} T5 and {clip_length} CLIP tokens hold no text")
        self.length, self.clip_length = length, clip_length
        self._t5 = _open(Path(folder) / "tokenizer_2", "T5")
        self._clip = _open(Path(folder) / "tokenizer", "CLIP")
        self.truncated = {"t5": 0, "clip": 0}

    def __call__(self, prompts: list[str]) -> T5ClipInputs:
        """Token ids int32."""
        return T5ClipInputs(
            self._encode("t5", self._t5, prompts, self.length),
            self._encode("clip", self._clip, prompts, self.clip_length),
        )

    def _encode(self, name, tokenizer, prompts, length) -> Int32[np.ndarray, "B T"]:
        ids = np.full((len(prompts), length), tokenizer.pad_token_id, np.int32)
        for row, prompt in enumerate(prompts):
            tokens = tokenizer(prompt, verbose=False)["input_ids"]
            if len(tokens) > length:
                self.truncated[name] += 1
                tokens = [*tokens[: length - 1], tokenizer.eos_token_id]
            ids[row, : len(tokens)] = tokens
        return ids
