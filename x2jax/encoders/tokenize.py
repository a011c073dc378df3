"""Instructions to token ids: chat template, left padding, through transformers' tokenizers."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

TEMPLATES = ("raw", "published")


class TextInputs(NamedTuple):
    """Token ids of an MLLM, left-padded, and True where there is a token."""

    ids_BT: Int[np.ndarray, "B T"]
    mask_BT: Bool[np.ndarray, "B T"]


def prompt(instruction: str, template: str) -> str:
    """The user turn of an instruction.

    "raw" is the instruction itself, as in the published training; "published" is how the published
    inference wraps it: the string form of a dictionary.
    """
    if template == "raw":
        return instruction
    if template == "published":
        fields = {
            "Text input": "",
            "Instruction editing description": instruction,
            "image input": "yes",
        }
        return str(fields)
    raise ValueError(f"unknown template {template!r}: use one of {', '.join(TEMPLATES)}")


class TextTokenizer:
    """Callable: instructions -> (ids, mask), left-padded to a fixed length. Picklable.

    An instruction that does not fit is cut at its end, so that the template stays whole;
    `truncated` counts these.
    """

    def __init__(self, folder: str | Path, length: int, template: str = "raw"):
        """Loads the tokenizer of a transformers folder.

        Raises:
          ValueError: the folder has no tokenizer or no chat template, an unknown template, or a
            length that the template alone exceeds.
        """
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers fork
        from transformers import AutoTokenizer  # slow to import

        prompt("", template)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise ValueError(f"no tokenizer could be loaded from {folder}: {e}") from None
        if not self._tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer in {folder} has no chat template (chat_template.jinja, or the key "
                "in tokenizer_config.json); take the whole folder of an Instruct model"
            )
        self.length, self.template, self.truncated = length, template, 0
        self.pad_id = self._tokenizer.pad_token_id
        if self.pad_id is None:
            raise ValueError(f"the tokenizer in {folder} has no pad token")
        overhead = len(self._encode(""))
        if overhead >= length:
            raise ValueError(
                f"text length {length} is too short: the chat template alone takes {overhead}"
            )

    def __call__(self, instructions: list[str]) -> TextInputs:
        """Token ids int32 and the mask of real tokens."""
        ids = np.full((len(instructions), self.length), self.pad_id, np.int32)
        mask = np.zeros(ids.shape, bool)
        for row, text in enumerate(instructions):
            tokens = self._fit(text)
            ids[row, self.length - len(tokens) :] = tokens
            mask[row, self.length - len(tokens) :] = True
        return TextInputs(ids, mask)

    def _fit(self, text: str) -> list[int]:
        tokens = self._encode(text)
        if len(tokens) <= self.length:
            return tokens
        self.truncated += 1
        low, high = 0, len(text)  # longest prefix that fits
        while low < high:
            middle = (low + high + 1) // 2
            if len(self._encode(text[:middle])) <= self.length:
                low = middle
            else:
                high = middle - 1
        return self._encode(text[:low])

    def _encode(self, text: str) -> list[int]:
        messages = [{"role": "user", "content": prompt(text, self.template)}]
        rendered = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return self._tokenizer(rendered, add_special_tokens=False)["input_ids"]
