"""Trains the tiny Qwen2.5-VL on the world's language: `python -m x2jax.tiny.language --family DIR`.

A byte-level BPE tokenizer in Qwen's format with its chat markers, then next-token prediction on
captions and instructions in English and Chinese.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from x2jax.encoders.qwen2_5_vl import QWEN_TINY, Qwen2_5_VL
from x2jax.encoders.tokenize import TextTokenizer
from x2jax.tiny import captions, edits, family, world
from x2jax.trees import Skeleton, state_params

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
"""The last ids of the vocabulary; `QWEN_TINY_VISION` names the last two."""
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] in ('image', 'video') %}"
    "{{ '<|vision_start|><|' + c['type'] + '_pad|><|vision_end|>' }}"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Qwen2.5-VL's, without its system turn: content is a text, or a list of texts and media."""
LENGTH = 64


def sentences(seed: int, count: int) -> list[str]:
    """Captions and instructions, about half of them Chinese."""
    rng = np.random.default_rng(seed)
    out = []
    for k in range(count):
        if k % 2:
            edit = edits.edit(seed, k)
            out.append(edit.instruction_zh if k % 4 == 1 else edit.instruction_en)
        else:
            language = "zh" if k % 8 == 0 else "en"
            out.append(captions.caption(world.sample_scene(rng), rng, language))
    return out


def make_tokenizer(texts: list[str], out: Path) -> None:
    """Trains and saves a tokenizer that `AutoTokenizer` reads."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # Chinese has no spaces: without single characters' classes split, whole sentences would merge.
    split = Regex(r"\p{Han}{1,2}| ?[A-Za-z]+| ?\d| ?[^\sA-Za-z\d\p{Han}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=QWEN_TINY.vocab - len(VISION),
        special_tokens=[AddedToken(s, special=True) for s in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(s, special=True) for s in VISION])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[0],
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(out)


def train(folder: Path, steps: int, batch: int, seed: int = 0):
    """Returns (params, held-out cross-entropy in nats a token)."""
    tokenize = TextTokenizer(folder, LENGTH)
    texts = sentences(seed, 20_000)
    ids, mask = tokenize(texts)
    held = [jnp.asarray(x) for x in tokenize(sentences(seed + 1, 256))]
    model = Qwen2_5_VL(QWEN_TINY, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(seed))
    skeleton, params = Skeleton(model), state_params(model)
    params["embed_tokens/embedding"] *= 0.2
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.warmup_cosine_decay_schedule(0, 3e-3, min(50, steps // 10), steps)),
    )

    def loss(params, ids, mask):
        model = skeleton.merge(params)
        logits = model.logits(model.hidden_states(ids, mask)[-1])[:, :-1]
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
        weight = mask[:, 1:] & mask[:, :-1]
        return (nll * weight).sum() / weight.sum()

    @jax.jit
    def step(params, opt, ids, mask):
        value, grads = jax.value_and_grad(loss)(params, ids, mask)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, value

    opt, rng = tx.init(params), np.random.default_rng(seed)
    bar = tqdm(range(steps), mininterval=5)
    for k in bar:
        rows = rng.integers(0, len(ids), batch)
        params, opt, value = step(params, opt, ids[rows], mask[rows])
        if k % 50 == 0:
            bar.set_postfix(loss=f"{float(value):.4f}")
    return params, float(jax.jit(loss)(params, *held)), tokenize.truncated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", type=Path, required=True, help="folder of qwen/")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    folder = args.family / "qwen"
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(sentences(0, 20_000), folder)
    params, held_out, truncated = train(folder, args.steps, args.batch)
    family.write_qwen(params, args.family, "bfloat16")
    print(f"held-out loss {held_out:.4f} nats a token; {truncated} instructions cut")


if __name__ == "__main__":
    main()
