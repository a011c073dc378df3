"""How often the task classifier is right about the tiny world's instructions.

    python -m benchmarks.classify --mllm tiny

The instructions are held out from the tiny family's training; chance is 1 in 15. Any folder that
`x2jax.classify` takes can be measured, in the wording that it chooses or is told.
"""

import argparse

import numpy as np

from x2jax.classify import NAMES, TEMPLATES, Classifier
from x2jax.tiny import edits

SEED = 77


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mllm", required=True)
    parser.add_argument("--wording", default="", choices=["", *TEMPLATES])
    parser.add_argument("--each", type=int, default=4, help="instructions a task and language")
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args(argv)
    tasks = np.tile(np.arange(1, len(NAMES) + 1), args.each)
    samples = [edits.edit(SEED, k, int(task)) for k, task in enumerate(tasks)]
    classify = Classifier(args.mllm, wording=args.wording, length=args.length)
    for language, texts in (
        ("English", [s.instruction_en for s in samples]),
        ("Chinese", [s.instruction_zh for s in samples]),
    ):
        found = classify(texts)
        right = np.array([f.task for f in found]) == tasks
        sure = np.mean([f.confidence for f in found])
        print(
            f"{language}: {right.mean():.1%} of {len(tasks)} right, mean confidence {sure:.2f}; "
            f"{len({f.task for f in found})} different answers"
        )


if __name__ == "__main__":
    main()
