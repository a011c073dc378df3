"""Instruction -> task, by a language model that may answer with task names and nothing else:

    python -m x2jax.classify --mllm DIR --prompt 'make the sky pink' --prompt '把天空变成粉色'

DIR is a transformers folder of Qwen2.5-VL or of Qwen3 (X2Edit classifies with Qwen3-8B), or "tiny".
The confidence is the probability of a name, end token included, among all 15 names, which one pass
scores together (`x2jax/encoders/choose.py`).
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from x2jax import sharding
from x2jax.data.tasks import TASKS
from x2jax.encoders.choose import log_probabilities, tree
from x2jax.encoders.language_model import load_decoder
from x2jax.encoders.tokenize import TextTokenizer

NAMES = TASKS[1:]
"""What may be answered; index 0 is task 1."""

HINTS = (
    "remove something",
    "add something",
    "redraw in another style",
    "other surroundings",
    "another colour",
    "another material",
    "another pose or movement",
    "put something in the place of something else",
    "face, hair, skin, clothes or expression of a person",
    "other words in the picture",
    "light, weather, season or mood of the whole picture",
    "move, turn or zoom the view, or move or resize something",
    "what would happen if, what lies behind a hint, or how things stand to each other",
    "a picture from edges, depth, a sketch or the like, or the other way round; restoration",
    "no edit: the same subject in a new picture",
)


def explained(instruction: str) -> str:
    """The question, for a model that follows instructions.

    DIFFERS: X2Edit asks in Chinese, for names half Chinese and half English, and lets the model
    answer freely.
    """
    kinds = "\n".join(f"- {name}: {hint}" for name, hint in zip(NAMES, HINTS, strict=True))
    return (
        f"An image is to be edited by this instruction:\n{instruction}\n\n"
        f"Which one of these kinds of edit is it?\n{kinds}\n\n"
        "Answer with the name of the kind alone."
    )


TEMPLATES = {"explained": explained, "raw": lambda instruction: instruction}
"""Instruction -> user turn."""


class Classified(NamedTuple):
    """Attributes:
    task: row of the task table, 1 to 15.
    name: of the task.
    confidence: its probability among the 15 names.
    probabilities: name -> probability; they add up to 1.
    """

    task: int
    name: str
    confidence: float
    probabilities: dict[str, float]


class Questions(TextTokenizer):
    """Instructions in a user turn of their own wording; thinking, where a model can, is off."""

    def __init__(self, folder, length: int, wording: str):
        self._words = TEMPLATES[wording]
        super().__init__(folder, length)

    def _encode(self, text: str) -> list[int]:
        return self._tokens(self._rendered(text))

    def _rendered(self, text: str) -> str:
        return self._tokenizer.apply_chat_template(
            [{"role": "user", "content": self._words(text)}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )

    def _tokens(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def answers(self, names: Sequence[str]) -> list[list[int]]:
        """Tokens of the answers, each with the end token."""
        rendered, end = self._rendered(""), self._tokenizer.eos_token_id
        start = self._tokens(rendered)
        found = [self._tokens(rendered + name) for name in names]
        if end is None or any(f[: len(start)] != start for f in found):
            raise ValueError("this tokenizer has no end token, or merges an answer into the prompt")
        return [[*f[len(start) :], end] for f in found]


class Classifier:
    """Callable: instructions -> tasks. One program, whatever their number."""

    def __init__(
        self,
        mllm: str,
        *,
        wording: str = "",
        length: int = 512,
        batch: int = 8,
        dtype: str = "bfloat16",
    ):
        """Loads a model.

        Args:
          mllm: transformers folder of Qwen2.5-VL or Qwen3, or "tiny".
          wording: one of `TEMPLATES`; "" for "explained", and "raw" for the tiny model, which knows
            instructions only.
          length: tokens of a prompt; longer instructions are cut.
          batch: instructions at a time.
          dtype: of weights and arithmetic.

        Raises:
          FileNotFoundError, ValueError: as `load_decoder` and `TextTokenizer`.
        """
        wording = wording or ("raw" if mllm == "tiny" else "explained")
        if wording not in TEMPLATES:
            raise ValueError(f"unknown wording {wording!r}: use one of {', '.join(TEMPLATES)}")
        mesh = sharding.make_mesh({"fsdp": -1})
        skeleton, self._params, folder = load_decoder(mllm, dtype=dtype, mesh=mesh)
        self._questions, self._batch = Questions(folder, length, wording), batch
        names = tree(self._questions.answers(NAMES))

        @jax.jit
        def run(params, ids, mask):
            return jax.nn.softmax(log_probabilities(skeleton.merge(params), ids, mask, names))

        self._run = run

    def __call__(self, instructions: Sequence[str]) -> list[Classified]:
        """A task for each instruction.

        Raises:
          ValueError: an empty instruction.
        """
        empty = [k for k, text in enumerate(instructions) if not text.strip()]
        if empty:
            raise ValueError(f"instructions {empty} are empty: say what to change")
        out = []
        for start in range(0, len(instructions), self._batch):
            some = list(instructions[start : start + self._batch])
            ids, mask = self._questions(some + [some[-1]] * (self._batch - len(some)))
            out += [_classified(p) for p in np.asarray(self._run(self._params, ids, mask))][
                : len(some)
            ]
        return out


def _classified(probabilities_C: np.ndarray) -> Classified:
    best = int(probabilities_C.argmax())
    by_name = dict(zip(NAMES, map(float, probabilities_C), strict=True))
    return Classified(best + 1, NAMES[best], float(probabilities_C[best]), by_name)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m x2jax.classify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--mllm", required=True, help="folder of Qwen2.5-VL or Qwen3, or tiny")
    parser.add_argument("--prompt", required=True, action="append", help="instruction; repeatable")
    parser.add_argument("--wording", default="", choices=["", *TEMPLATES], help="of the question")
    parser.add_argument("--length", type=int, default=512, help="tokens of a prompt, at most")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    args = parser.parse_args(argv)
    try:
        classify = Classifier(
            args.mllm,
            wording=args.wording,
            length=args.length,
            batch=min(8, len(args.prompt)),
            dtype=args.dtype,
        )
        found = classify(args.prompt)
    except (OSError, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    for text, answer in zip(args.prompt, found, strict=True):
        ranked: list[Any] = sorted(answer.probabilities.items(), key=lambda x: -x[1])
        rest = ", ".join(f"{name} {p:.2f}" for name, p in ranked[1:3])
        print(f"{answer.name} (task {answer.task}), confidence {answer.confidence:.2f}: {text}")
        print(f"  then {rest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
