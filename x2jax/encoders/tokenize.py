"""Instructions to token ids: chat template, left padding, through transformers' tokenizers."""

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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


def open_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a transformers folder.

    Raises:
      ValueError: the folder has no tokenizer, or one without a chat template or a pad token.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers fork
    from transformers import AutoTokenizer  # slow to import

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ValueError(f"no tokenizer could be loaded from {folder}: {e}") from None
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer in {folder} has no chat template (chat_template.jinja, or the key "
            "in tokenizer_config.json); take the whole folder of an Instruct model"
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(f"the tokenizer in {folder} has no pad token")
    return tokenizer


def fingerprint_of(tokenizer: Any) -> str:
    """Hash of a tokenizer's vocabulary, merges and chat template."""
    text = tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def left_padded(rows: list[list[int]], length: int, pad_id: int) -> TextInputs:
    """Rows of token ids, right-aligned in `length`; the caller guarantees that they fit."""
    ids = np.full((len(rows), length), pad_id, np.int32)
    mask = np.zeros(ids.shape, bool)
    for n, row in enumerate(rows):
        ids[n, length - len(row) :] = row
        mask[n, length - len(row) :] = True
    return TextInputs(ids, mask)


def longest_prefix(text: str, fits: Callable[[str], bool]) -> str:
    """The longest beginning of a text that fits; the empty one if none does."""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if fits(text[:middle]):
            low = middle
        else:
            high = middle - 1
    return text[:low]


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
        prompt("", template)
        self._tokenizer = open_tokenizer(folder)
        self.length, self.template, self.truncated = length, template, 0
        self.pad_id = self._tokenizer.pad_token_id
        overhead = len(self._encode(""))
        if overhead >= length:
            raise ValueError(
                f"text length {length} is too short: the chat template alone takes {overhead}"
            )

    @property
    def record(self) -> dict[str, Any]:
        """What made the ids: to be kept, and compared, with what came of them."""
        return {"length": self.length, "template": self.template, "tokenizer": self.fingerprint}

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the vocabulary, the merges and the chat template."""
        return fingerprint_of(self._tokenizer)

    def __call__(self, instructions: list[str]) -> TextInputs:
        """Token ids int32 and the mask of real tokens."""
        return left_padded([self.tokens(t) for t in instructions], self.length, self.pad_id)

    def tokens(self, text: str) -> list[int]:
        """Token ids of one instruction, without padding."""
        tokens = self._encode(text)
        if len(tokens) <= self.length:
            return tokens
        self.truncated += 1
        return self._encode(
            longest_prefix(text, lambda start: len(self._encode(start)) <= self.length)
        )

    def _encode(self, text: str) -> list[int]:
        messages = [{"role": "user", "content": prompt(text, self.template)}]
        rendered = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return self._tokenizer(rendered, add_special_tokens=False)["input_ids"]
