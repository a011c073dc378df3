"""Decoding token by token with a cache, in one program: greedy or sampled, with images and video.

Axes beside `x2jax/shapes.py`: G generated tokens, S slots of the cache (prompt, then generated).
"""

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from x2jax.encoders.decoder import Decoder, causal, text_positions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn; data of the compiled program, so that one serves every setting.

    Attributes:
      temperature: 0 is greedy.
      top_k: only the k likeliest tokens (and what ties with the last of them); 0 for all.
      top_p: of these, the fewest likeliest tokens whose probabilities reach p.

    Raises:
      ValueError: values outside their ranges.
    """

    temperature: Any = 0.0
    top_k: Any = 0
    top_p: Any = 1.0

    def __post_init__(self):
        wrong = [
            f"{name}={value} must be {rule}"
            for name, value, rule, ok in (
                ("temperature", self.temperature, "at least 0", lambda x: x >= 0),
                (
                    "top_k",
                    self.top_k,
                    "a whole number, 0 for all",
                    lambda x: x >= 0 and x == x // 1,
                ),
                ("top_p", self.top_p, "above 0 and at most 1", lambda x: 0 < x <= 1),
            )
            if isinstance(value, numbers.Real) and not ok(value)  # traced values pass
        ]
        if wrong:
            raise ValueError("; ".join(wrong))

    @property
    def is_greedy(self) -> bool:
        """Whether that is known while tracing."""
        return isinstance(self.temperature, numbers.Real) and self.temperature == 0


GREEDY = Sampling()


class Generated(NamedTuple):
    """Attributes:
    tokens_BG: generated ids, `pad` after the end.
    lengths_B: how many of them a sample has, the one that ended it included.
    states_NBGD: hidden states as `Decoder.hidden_states` has them, after reading each generated
      token, the last one too; 0 after the end. None unless asked for. The published reasoning mode
      of X2I conditions on all but the last (which its loop never reads): `lengths - 1` of them.
    """

    tokens_BG: Int[Array, "B G"]
    lengths_B: Int[Array, "B"]
    states_NBGD: Any


class _Loop(NamedTuple):
    step: Array
    token_B: Array
    done_B: Array
    cache: Any
    out: Generated


def generate(
    model: Decoder,
    ids_BT: Int[Array, "B T"],
    mask_BT: Bool[Array, "B T"],
    *,
    count: int,
    eos: Sequence[int] | Int[Array, "E"],
    pad: int = 0,
    sampling: Sampling = GREEDY,
    key: PRNGKeyArray | None = None,
    positions_BT3: Int[Array, "B T 3"] | None = None,
    deltas_B: Int[Array, "B"] | None = None,
    vision: Any = None,
    keep_states: bool = True,
) -> Generated:
    """Continues left-padded prompts; meant to be jitted by the caller, `count` static.

    The same seed gives a row the same tokens whatever rows lie beside it.

    Args:
      ids_BT, mask_BT: prompts, left-padded: the last token of every row is a real one.
      count: most tokens to generate.
      eos: ids that end a sample; may be empty.
      pad: id after the end.
      sampling: how tokens are drawn.
      key: of the drawing; may be None for `GREEDY`.
      positions_BT3, deltas_B: of prompts with images or videos, both from `mrope_positions`.
      vision: as `Decoder.hidden_states` takes it.
      keep_states: whether to return the hidden states of generated tokens.

    Raises:
      ValueError: no room for a token, positions without deltas, or as `Decoder.embed`.
    """
    batch, length = ids_BT.shape
    if count < 1:
        raise ValueError(f"count={count}: generate at least one token")
    if (positions_BT3 is None) != (deltas_B is None):
        raise ValueError("give positions_BT3 and deltas_B together: mrope_positions makes both")
    if key is None and not sampling.is_greedy:
        raise ValueError("sampling needs a key: jax.random.key(seed)")
    eos_E = jnp.asarray(eos, jnp.int32)
    slots = length + count
    first_B = mask_BT.sum(axis=1) + (0 if deltas_B is None else deltas_B)  # of a generated token
    prompt_BS = jnp.pad(mask_BT, ((0, 0), (0, count)))

    def pick(last_B1D, step):
        return draw(model.logits(last_B1D)[:, 0].astype(jnp.float32), sampling, key, step)

    def body(loop: _Loop) -> _Loop:
        step, token_B, out = loop.step, loop.token_B, loop.out
        generated_S = (jnp.arange(slots) >= length) & (jnp.arange(slots) <= length + step)
        seen = model.run(
            model.embed_tokens(token_B[:, None]),
            (first_B + step)[:, None],
            (prompt_BS | generated_S)[:, None],
            loop.cache,
            length + step,
            keep_states=keep_states,
        )
        states = out.states_NBGD
        if keep_states:
            kept = jnp.where(loop.done_B[:, None, None], 0, seen.states_NBTD)
            states = jax.lax.dynamic_update_slice_in_dim(states, kept, step, axis=2)
        out = Generated(
            out.tokens_BG.at[:, step].set(token_B), out.lengths_B + ~loop.done_B, states
        )
        done_B = loop.done_B | jnp.isin(token_B, eos_E)
        token_B = jnp.where(done_B, pad, pick(seen.last_BTD, step + 1))
        return _Loop(step + 1, token_B, done_B, seen.cache, out)

    positions = text_positions(mask_BT) if positions_BT3 is None else positions_BT3
    read = model.run(
        model.embed(ids_BT, mask_BT, positions_BT3, vision),
        positions,
        jnp.pad(causal(mask_BT, model.cfg.pad_attention), ((0, 0), (0, 0), (0, count))),
        model.empty_cache(batch, slots),
        keep_states=False,
    )
    states = None
    if keep_states:
        shape = (model.cfg.layers + 1, batch, count, model.cfg.width)
        states = jnp.zeros(shape, read.last_BTD.dtype)
    out = Generated(
        jnp.full((batch, count), pad, jnp.int32), jnp.zeros((batch,), jnp.int32), states
    )
    token_B = pick(read.last_BTD[:, -1:], 0)
    start = _Loop(jnp.int32(0), token_B, jnp.zeros((batch,), bool), read.cache, out)

    def more(loop: _Loop):
        return (loop.step < count) & ~loop.done_B.all()

    return jax.lax.while_loop(more, body, start).out


def draw(
    logits_BV: Float[Array, "B V"], sampling: Sampling, key: PRNGKeyArray | None, step: Any
) -> Int[Array, "B"]:
    """A token for each row, from numbers that belong to the key, the step and the row."""

    def sampled():
        keys = jax.random.fold_in(key, step)
        rows = jax.vmap(lambda b: jax.random.fold_in(keys, b))(jnp.arange(len(logits_BV)))
        token_B = jax.vmap(jax.random.categorical)(rows, restrict(logits_BV, sampling))
        return token_B.astype(jnp.int32)

    def greedy():
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    if sampling.is_greedy:
        return greedy()
    # Where the temperature is data, greedy decoding still does not sort the vocabulary.
    return jax.lax.cond(jnp.asarray(sampling.temperature) > 0, sampled, greedy)


def restrict(logits_BV: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits of the distribution that is drawn from, for a temperature above 0.

    Temperature, then top-k, then top-p, as transformers orders them; -inf outside.
    """
    x = logits_BV / sampling.temperature
    vocab = x.shape[-1]
    falling = jnp.sort(x, axis=-1, descending=True)
    k = jnp.where(jnp.asarray(sampling.top_k) > 0, jnp.minimum(sampling.top_k, vocab), vocab)
    kth = jnp.take(falling, k.astype(jnp.int32) - 1, axis=-1)[..., None]
    p = jax.nn.softmax(jnp.where(falling >= kth, falling, -jnp.inf), axis=-1)
    before = jnp.cumsum(p, axis=-1) - p
    inside = (falling >= kth) & (before < sampling.top_p)
    least = jnp.min(jnp.where(inside, falling, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(x >= least, x, -jnp.inf)
