"""Tokenizers of the tiny T5 and CLIP: small vocabularies in the classes that FLUX.1 has.

    python -m x2jax.tiny.tokenizers --family DIR

writes flux/tokenizer_2 (Unigram, as T5's) and flux/tokenizer (byte-level BPE, as CLIP's), made of
the tiny world's captions and instructions in English and Chinese.
"""

import argparse
import json
import string
from pathlib import Path

from x2jax.encoders.clip import CLIP_TINY
from x2jax.encoders.t5 import T5_TINY
from x2jax.tiny.language import sentences

T5_SPECIAL = ("<pad>", "</s>", "<unk>")
CLIP_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
END = "</w>"


def make_t5(texts: list[str], out: Path) -> None:
    """Trains and saves a `T5Tokenizer`: pad, end and unknown first, without sentinels."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import T5Tokenizer

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=T5_TINY.vocab,
        special_tokens=list(T5_SPECIAL),
        unk_token=T5_SPECIAL[2],
        initial_alphabet=[*string.ascii_letters, *string.digits, *string.punctuation],
        max_piece_length=12,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pieces = [tuple(p) for p in json.loads(tokenizer.to_str())["model"]["vocab"]]
    T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512).save_pretrained(out)


def make_clip(texts: list[str], out: Path) -> None:
    """Trains and saves a `CLIPTokenizer`: bytes, bytes that end a word, merges, start, end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    frame = CLIPTokenizer().backend_tokenizer  # CLIP's own normalising and splitting
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=END))
    tokenizer.normalizer, tokenizer.pre_tokenizer = frame.normalizer, frame.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=CLIP_TINY.vocab,
        initial_alphabet=alphabet,
        end_of_word_suffix=END,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = [tuple(m) for m in json.loads(tokenizer.to_str())["model"]["merges"]]
    # Every byte may end a word, seen so or not: nothing is ever unknown.
    tokens = [*alphabet, *(a + END for a in alphabet)]
    merges = merges[: CLIP_TINY.vocab - len(tokens) - len(CLIP_SPECIAL)]
    tokens += ["".join(m) for m in merges]
    vocab = {t: k for k, t in enumerate([*tokens, *CLIP_SPECIAL])}
    CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_TINY.positions).save_pretrained(
        out
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", type=Path, required=True, help="folder of flux/")
    args = parser.parse_args()
    texts = sentences(0, 20_000)
    make_t5(texts, args.family / "flux" / "tokenizer_2")
    make_clip(texts, args.family / "flux" / "tokenizer")


if __name__ == "__main__":
    main()
