"""Teaches the tiny Qwen2.5-VL to name tasks: `python -m x2jax.tiny.answers --family DIR`.

The output head alone learns, from the states of the frozen trunk: the task's name after an
instruction, English or Chinese, and the next token of captions and instructions as before. So all
that AlignNet and FLUX learnt from the hidden states stays as it is. `benchmarks/classify.py`
measures what came of it.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int
from tqdm import tqdm

from x2jax.children import Precision, configs_of, find_sources, load_child
from x2jax.classify import NAMES, Questions
from x2jax.encoders.tokenize import TextTokenizer, left_padded
from x2jax.model import make_skeleton
from x2jax.sharding import make_mesh, param_shardings
from x2jax.tiny import edits, family, language
from x2jax.tiny.language import LENGTH
from x2jax.trees import child

ROOM = 16
"""Most tokens of an answer."""
HEAD = "lm_head/kernel"


class Pairs(NamedTuple):
    """States and the tokens that follow them.

    Attributes: (n, width); (n,).
    """

    states: Float[np.ndarray, "n D"]
    tokens: Int[np.ndarray, "n"]


def answers(questions: Questions, seed: int, count: int) -> list[tuple[list[int], int]]:
    """Token ids of instructions, each with its task's name behind, and of how many that is."""
    named, rows = questions.answers(NAMES), []
    for k in range(count):
        task = 1 + k % len(NAMES)
        edit = edits.edit(seed, k, task)
        for text in (edit.instruction_en, edit.instruction_zh):
            rows.append((questions.tokens(text) + named[task - 1], len(named[task - 1])))
    return rows


def sentences(tokenize: TextTokenizer, seed: int, count: int) -> list[tuple[list[int], int]]:
    """Token ids of captions and instructions; all but the first are to be foretold."""
    rows = [tokenize.tokens(text) for text in language.sentences(seed, count)]
    return [(row, len(row) - 1) for row in rows]


def pairs(states, rows: list[tuple[list[int], int]], batch: int = 64) -> Pairs:
    """The last tokens of rows, and the states before each."""
    length, found = LENGTH + ROOM, []
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        full = some + [some[-1]] * (batch - len(some))
        last = np.asarray(states(*left_padded([ids for ids, _ in full], length, 0)))
        found += [
            Pairs(x[length - n - 1 : length - 1], np.array(ids[-n:]))
            for x, (ids, n) in zip(last, some, strict=False)
        ]
    return Pairs(*map(np.concatenate, zip(*found, strict=True)))


def nll(head, states, tokens):
    """Mean cross-entropy in nats a token."""
    return optax.softmax_cross_entropy_with_integer_labels(states @ head, tokens).mean()


def train(head, answered: Pairs, read: Pairs, steps: int, batch: int = 256, seed: int = 0):
    """The head after `steps` of Adam on as many answers as text."""
    tx = optax.adam(optax.cosine_decay_schedule(3e-3, steps, 0.02))
    lessons = jax.tree.map(jnp.asarray, (answered, read))

    @jax.jit
    def step(head, opt, rows):
        def loss(head):
            return sum(
                nll(head, x.states[i], x.tokens[i]) for x, i in zip(lessons, rows, strict=True)
            )

        updates, opt = tx.update(jax.grad(loss)(head), opt, head)
        return optax.apply_updates(head, updates), opt

    opt, rng = tx.init(head), np.random.default_rng(seed)
    for _ in tqdm(range(steps), mininterval=5):
        rows = [rng.integers(0, len(x.tokens), batch) for x in lessons]
        head, opt = step(head, opt, rows)
    return head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", type=Path, required=True, help="folder of qwen/")
    parser.add_argument("--edits", type=int, default=3000, help="each in two languages")
    parser.add_argument("--steps", type=int, default=6000)
    args = parser.parse_args()
    folder = args.family / "qwen"
    found = find_sources({"mllm": str(folder)}, ["mllm"], vision=True)
    cfg = configs_of(found)["mllm"]
    skeleton = make_skeleton({"mllm": cfg}, Precision("float32", "float32"))
    by_path = param_shardings(skeleton.abstract, make_mesh({"fsdp": 1}, jax.devices()[:1]))
    weights = load_child(skeleton, found, "mllm", by_path)
    run = jax.jit(lambda p, ids, mask: skeleton.merge(p).mllm.hidden_states(ids, mask)[-1])
    states = lambda ids, mask: run(weights, ids, mask)  # noqa: E731
    questions, tokenize = Questions(folder, LENGTH, "raw"), TextTokenizer(folder, LENGTH)
    answered = pairs(states, answers(questions, 3, args.edits))
    read = pairs(states, sentences(tokenize, 0, args.edits // 2))
    unseen = pairs(states, answers(questions, 78, 150)), pairs(states, sentences(tokenize, 1, 200))
    start = weights.get(f"mllm/{HEAD}", weights["mllm/embed_tokens/embedding"].T)
    head = train(start, answered, read, args.steps)
    for name, held in zip(("answers", "text"), unseen, strict=True):
        before, after = float(nll(start, *held)), float(nll(head, *held))
        print(f"held-out {name}: {before:.3f} -> {after:.3f} nats a token")
    params = child(weights, "mllm") | {HEAD: head}
    family.write_qwen(params, args.family, "bfloat16", cfg.vision)


if __name__ == "__main__":
    main()
