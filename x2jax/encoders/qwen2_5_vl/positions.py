"""Rotary positions of prompts with text, images and videos, on the host."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from x2jax.encoders.qwen2_5_vl.preprocess import Media
from x2jax.encoders.qwen2_5_vl.vision_config import VisionConfig


def mrope_positions(
    ids_BT: Int[np.ndarray, "B T"],
    mask_BT: Bool[np.ndarray, "B T"],
    batch: Sequence[Sequence[Media]],
    cfg: VisionConfig,
) -> tuple[Int[np.ndarray, "B T 3"], Int[np.ndarray, "B"]]:
    """Temporal, row and column positions, as `get_rope_index` of transformers gives them.

    Text counts up in all three. An image or video starts at the next free number; what follows it
    starts beyond its longer side, however long the video is.

    Args:
      ids_BT: token ids; an image or video holds one image or video token for each of its tokens.
      mask_BT: True at tokens.
      batch: per sample its images and videos, in the order of their tokens.

    Returns:
      The positions, 1 at pads; and what a token generated next adds to the count of tokens so far
      to get its position.

    Raises:
      ValueError: the tokens of a sample and its images and videos do not correspond.
    """
    ids, mask = np.asarray(ids_BT), np.asarray(mask_BT, bool)
    if len(batch) != len(ids):
        raise ValueError(f"{len(ids)} prompts, but images and videos of {len(batch)} samples")
    # DIFFERS: transformers 5 has 0 at pads. AlignNet reads them; it was trained with those of 4.
    positions_BT3 = np.ones((*ids.shape, 3), np.int32)
    deltas_B = np.zeros(len(ids), np.int32)
    for b, media in enumerate(batch):
        try:
            positions = _sample(ids[b, mask[b]], media, cfg)
        except ValueError as e:
            raise ValueError(f"sample {b}: {e}") from None
        positions_BT3[b, mask[b]] = positions
        deltas_B[b] = positions.max(initial=-1) + 1 - len(positions)
    return positions_BT3, deltas_B


def _sample(ids_T: np.ndarray, media: Sequence[Media], cfg: VisionConfig) -> np.ndarray:
    tokens = {"image": cfg.image_token, "video": cfg.video_token}
    is_media = np.isin(ids_T, list(tokens.values()))
    expected = sum(cfg.tokens(m.grid) for m in media)
    if is_media.sum() != expected:
        raise ValueError(
            f"the prompt has {is_media.sum()} image and video tokens, its {len(media)} images and "
            f"videos need {expected}: repeat each one's token as often as it has tokens"
        )
    out = np.zeros((len(ids_T), 3), np.int64)
    at = start = 0
    for number, m in enumerate(media):
        text = int(np.argmax(is_media[at:]))
        out[at : at + text] = start + np.arange(text)[:, None]
        at, start = at + text, start + text
        count = cfg.tokens(m.grid)
        if np.any(ids_T[at : at + count] != tokens[m.kind]):
            raise ValueError(
                f"item {number} is of kind {m.kind!r} and needs {count} tokens {tokens[m.kind]} in "
                f"a row from token {at} on: keep images and videos in the order of the prompt"
            )
        out[at : at + count] = start + _inside(m, cfg)
        at, start = at + count, start + max(m.grid[1:]) // cfg.merge
    out[at:] = start + np.arange(len(ids_T) - at)[:, None]
    return out


def _inside(m: Media, cfg: VisionConfig) -> np.ndarray:
    """Positions of an image's or video's tokens relative to its first."""
    t, h, w = m.grid
    step, row, column = np.mgrid[:t, : h // cfg.merge, : w // cfg.merge].reshape(3, -1)
    # In float32, then cut off: as torch multiplies integers by a number.
    step = step.astype(np.float32) * np.float32(cfg.tokens_per_second * m.seconds)
    return np.stack([step.astype(np.int64), row, column], axis=-1)
