"""Optimizers and schedules from Optax, by name, with rules on parameter paths.

No 8-bit state: Optax has none, and no maintained JAX library offers one (November 2026;
`flashoptim-jax` is a single release, bitsandbytes and torchao are PyTorch's). What saves memory
here: `lion` keeps one moment instead of two, `adafactor` a row and a column of one, and
`adamw.mu_dtype="bfloat16"` halves the first.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import optax
from optax import contrib

from x2jax.trees import Params, check_rules, matches


class Optimizer(NamedTuple):
    """One of Optax's.

    Attributes:
      make: its constructor.
      decay: the constructor's name for weight decay.
      mask: the constructor's name for what decays; "" where it decays everything.
      scales: whether an update may be scaled afterwards, which is a learning rate of its own.
    """

    make: Callable[..., optax.GradientTransformation]
    decay: str = "weight_decay"
    mask: str = "mask"
    scales: bool = True


OPTIMIZERS = {
    "adamw": Optimizer(optax.adamw),
    "adafactor": Optimizer(optax.adafactor, "weight_decay_rate", "weight_decay_mask"),
    "lion": Optimizer(optax.lion),
    # It measures how far it has come, and so needs to know all of its step.
    "prodigy": Optimizer(contrib.prodigy, mask="", scales=False),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": dict(b1=0.9, b2=0.999, eps=1e-8, weight_decay=1e-4, mu_dtype="float32"),
    "adafactor": dict(
        decay_rate=0.8,
        multiply_by_parameter_scale=True,
        clipping_threshold=1.0,
        weight_decay_rate=0.0,  # not scaled by the learning rate
    ),
    "lion": dict(b1=0.9, b2=0.99, weight_decay=1e-3, mu_dtype="float32"),
    "prodigy": dict(estim_lr_coef=1.0, weight_decay=0.0, safeguard_warmup=False),
}
"""Options that a config shows, with Optax's own values; any other one of the constructor may be
added to a config."""
SCHEDULES = ("constant", "cosine", "linear", "wsd")


def defaults(**changes: Any) -> dict[str, Any]:
    """`config.optimizer` with every key that the command line may set; `changes` replace some.

    A change that is a dictionary replaces entries of that optimizer's options.
    """
    shared = dict(
        name="adamw",
        learning_rate=1e-4,
        schedule="constant",
        warmup=0,
        cooldown=0,
        clip=1.0,
        decay=(r".*",),
        multipliers=(),
    )
    own = {k: v | changes.pop(k, {}) for k, v in OPTIONS.items()}
    return shared | own | changes


def make_schedule(
    name: str, peak: float, warmup: int, steps: int, cooldown: int = 0
) -> optax.Schedule:
    """Learning rate by step: linear warm-up to `peak`, then by name.

    Args:
      name: "constant"; "cosine" or "linear", down to 0 at `steps`; "wsd" (warm-up, stable, decay):
        constant, and down to 0 linearly in the last `cooldown` steps.
      peak: highest learning rate.
      warmup: steps of warm-up.
      steps: of the whole run.
      cooldown: read by "wsd" alone.

    Raises:
      ValueError: unknown name, or a decay with no steps left after the warm-up.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}: use one of {', '.join(SCHEDULES)}")
    if name != "constant" and steps <= warmup:
        raise ValueError(f"schedule {name!r} needs more than {warmup} (warmup) steps, got {steps}")
    if name == "wsd" and not 0 < cooldown <= steps - warmup:
        raise ValueError(
            f"schedule 'wsd' needs a cooldown of 1 to {steps - warmup} steps (steps - warmup), "
            f"got {cooldown}"
        )
    constant = optax.constant_schedule(peak)
    parts: list[tuple[int, optax.Schedule]] = [(warmup, optax.linear_schedule(0.0, peak, warmup))]
    if name == "constant":
        parts.append((0, constant))
    elif name == "cosine":
        parts.append((0, optax.cosine_decay_schedule(peak, steps - warmup)))
    elif name == "linear":
        parts.append((0, optax.linear_schedule(peak, 0.0, steps - warmup)))
    else:
        parts.append((steps - warmup - cooldown, constant))
        parts.append((0, optax.linear_schedule(peak, 0.0, cooldown)))
    return _in_turn(parts)


def _in_turn(parts: Sequence[tuple[int, optax.Schedule]]) -> optax.Schedule:
    """Schedules one after another: (steps, schedule); those of no steps, but for the last, drop."""
    kept = [p for p in parts[:-1] if p[0]] + [parts[-1]]
    if len(kept) == 1:
        return kept[0][1]
    ends = [sum(n for n, _ in kept[: k + 1]) for k in range(len(kept) - 1)]
    return optax.join_schedules([s for _, s in kept], ends)


def build(
    *,
    name: str,
    learning_rate: float,
    schedule: str,
    warmup: int,
    clip: float,
    steps: int,
    cooldown: int = 0,
    decay: Sequence[str] = (r".*",),
    multipliers: Sequence[tuple[str, float]] = (),
    **options: Mapping[str, Any],
) -> optax.GradientTransformation:
    """Global-norm clipping and the named optimizer.

    Rules are regular expressions that match whole parameter paths, as `config.trainable` has them.
    They are checked against the parameters when the state is made: one that matches nothing is an
    error.

    Args:
      name: one of `OPTIMIZERS`.
      learning_rate, schedule, warmup, cooldown, steps: as `make_schedule` takes them. Prodigy finds
        its own learning rate: give it 1.
      clip: largest global norm of a gradient.
      decay: rules of the parameters that weight decay acts on.
      multipliers: (rule, factor) pairs on the learning rate and on the decay that goes with it; the
        first rule that matches a path decides, and 1 where none does.
      options: optimizer -> keyword arguments of its Optax constructor; those of the others rest.

    Raises:
      ValueError: unknown names, or rules that this optimizer cannot follow. TypeError: an option
        that the optimizer lacks.
    """
    _check_names(name, options)
    kind, given = OPTIMIZERS[name], dict(options.get(name, {}))
    if kind.mask:
        given[kind.mask] = lambda params: _decayed(params, decay)
    elif tuple(decay) != (r".*",) and given.get(kind.decay):
        raise ValueError(
            f"optimizer {name!r} decays all parameters or none: set optimizer.decay to ('.*',) "
            f"or optimizer.{name}.{kind.decay} to 0"
        )
    if multipliers and not kind.scales:
        raise ValueError(
            f"optimizer {name!r} finds one learning rate for all parameters: it takes no "
            "optimizer.multipliers"
        )
    rate = make_schedule(schedule, learning_rate, warmup, steps, cooldown)
    parts = [optax.clip_by_global_norm(clip), kind.make(rate, **given)]
    if multipliers:
        parts.append(scale_by_path(multipliers))
    return optax.chain(*parts)


def _check_names(name: str, options: Mapping[str, Any]) -> None:
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}: use one of {', '.join(OPTIMIZERS)}")
    stray = [k for k in options if k not in OPTIMIZERS]
    if stray:
        raise ValueError(
            f"optimizer options {stray} stand under no optimizer: write optimizer.{name}.{stray[0]}"
        )


def _decayed(params: Params, rules: Sequence[str]) -> dict[str, bool]:
    check_rules(params, rules, "--config.optimizer.decay")
    return {p: matches(p, rules) for p in params}


def scale_by_path(multipliers: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
    """Scales the update of every path by the factor of the first rule that matches it."""

    def factor(path: str) -> float:
        return next((f for rule, f in multipliers if matches(path, (rule,))), 1.0)

    def init(params: Params) -> optax.EmptyState:
        check_rules(params, [rule for rule, _ in multipliers], "--config.optimizer.multipliers")
        return optax.EmptyState()

    def update(updates: Params, state: optax.EmptyState, params: Params | None = None):
        return {p: u * factor(p) for p, u in updates.items()}, state

    return optax.GradientTransformation(init, update)
