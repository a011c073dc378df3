"""Optimizers and schedules from Optax, by name."""

from typing import Any

import optax

OPTIMIZERS = {"adamw": optax.adamw}
SCHEDULES = ("constant", "cosine", "linear")


def make_schedule(name: str, peak: float, warmup: int, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up to `peak`, then constant, or down to 0 at `steps`.

    Raises:
      ValueError: unknown name, or a decay with no steps left after the warm-up.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}: use one of {', '.join(SCHEDULES)}")
    if name == "constant":
        main = optax.constant_schedule(peak)
    elif steps <= warmup:
        raise ValueError(f"schedule {name!r} needs more than {warmup} (warmup) steps, got {steps}")
    elif name == "cosine":
        main = optax.cosine_decay_schedule(peak, steps - warmup)
    else:
        main = optax.linear_schedule(peak, 0.0, steps - warmup)
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), main], [warmup])


def build(
    *,
    name: str,
    learning_rate: float,
    schedule: str,
    warmup: int,
    clip: float,
    steps: int,
    **options: Any,
) -> optax.GradientTransformation:
    """Global-norm clipping and the named optimizer; `options` go to its Optax constructor.

    Raises:
      ValueError: unknown optimizer or schedule. TypeError: an option the optimizer lacks.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}: use one of {', '.join(OPTIMIZERS)}")
    rate = make_schedule(schedule, learning_rate, warmup, steps)
    return optax.chain(optax.clip_by_global_norm(clip), OPTIMIZERS[name](rate, **options))
