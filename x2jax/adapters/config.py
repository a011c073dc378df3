"""What is adapted, and with how many experts of which rank."""

import dataclasses
from collections.abc import Mapping
from typing import Any

DOUBLE_PROJECTIONS = tuple(
    f"{stream}_{name}"
    for stream in ("img", "txt")
    for name in ("attn/q", "attn/k", "attn/v", "attn/proj", "mlp/mlp_in", "mlp/mlp_out")
)
SINGLE_PROJECTIONS = ("attn/q", "attn/k", "attn/v", "attn/proj", "mlp/mlp_in", "mlp/mlp_out")


def _of(names: tuple[str, ...], *parts: str) -> tuple[str, ...]:
    return tuple(n for n in names if any(part in n for part in parts))


PRESETS = {
    "attention": (_of(DOUBLE_PROJECTIONS, "attn/"), _of(SINGLE_PROJECTIONS, "/q", "/k", "/v")),
    "attention+mlp": (
        DOUBLE_PROJECTIONS,
        _of(SINGLE_PROJECTIONS, "/q", "/k", "/v", "mlp_in"),
    ),
    "all": (DOUBLE_PROJECTIONS, SINGLE_PROJECTIONS),
}
"""What a plain LoRA adapts: projections of double and of single blocks. Single blocks fuse the
output projections of attention and MLP, which other tools adapt as one: "all" has both."""


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """A set of (MoE-)LoRA adapters.

    Attributes:
      experts: routed experts; 0 makes every adapter a plain LoRA, its one expert always on.
      rank: rank of each expert.
      alpha: scale is alpha / rank; None means alpha = rank, as in the X2Edit releases.
      top_k: routed experts a token uses.
      double, single: adapted projections of either block kind, as paths inside the block.
      series: those of `double` and `single` whose delta reads the projection's output:
        h = proj(attention); h = h + delta(h).
      tasks: rows of the task table; 0 where nothing is routed.
      form: "static" or "routed": the same function, see `moe_lora`.
      dropout: probability with which training drops an input of an adapter's experts.
    """

    experts: int = 12
    rank: int = 64
    alpha: float | None = None
    top_k: int = 2
    double: tuple[str, ...] = ("img_attn/q", "img_attn/k", "img_attn/v", "img_attn/proj")
    single: tuple[str, ...] = ("attn/q", "attn/k", "attn/v")
    series: tuple[str, ...] = ("img_attn/proj",)
    tasks: int = 16
    form: str = "static"
    dropout: float = 0.0

    def __post_init__(self):
        unknown = [f"double: {n}" for n in self.double if n not in DOUBLE_PROJECTIONS]
        unknown += [f"single: {n}" for n in self.single if n not in SINGLE_PROJECTIONS]
        unknown += [f"series: {n}" for n in self.series if n not in self.double + self.single]
        if unknown:
            raise ValueError(
                f"unknown projections {unknown}; double blocks have {DOUBLE_PROJECTIONS}, "
                f"single blocks {SINGLE_PROJECTIONS}, and series names must be among the adapted"
            )
        wide = [n for n in self.series if "mlp/" in n]
        if wide:
            raise ValueError(f"a series adapter needs a square projection; {wide} are not")
        if self.form not in ("static", "routed"):
            raise ValueError(f"unknown form {self.form!r}: use 'static' or 'routed'")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} must be at least 0 and below 1")
        if self.experts and not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k {self.top_k} must be between 1 and experts {self.experts}")
        if bool(self.experts) != bool(self.tasks):
            raise ValueError("routed experts need a task table, and only they do")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "AdapterConfig":
        """Of a run's `config.adapter`: a preset of plain LoRA, or the arguments themselves.

        Raises:
          ValueError: as the constructor and `plain_lora`. TypeError: options that do not exist.
        """
        if "preset" in options:
            return plain_lora(**options)
        # JSON has lists only.
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


X2EDIT = AdapterConfig()
X2EDIT_TINY = AdapterConfig(experts=4, rank=16)


def plain_lora(*, preset: str, rank: int, alpha: float, dropout: float) -> AdapterConfig:
    """A LoRA on the projections of a preset, its delta scaled by alpha / rank.

    Raises:
      ValueError: unknown preset, a rank below 1, or a dropout that is no probability below 1.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown adapter.preset {preset!r}: use one of {', '.join(PRESETS)}")
    if rank < 1:
        raise ValueError(f"rank {rank} must be at least 1")
    double, single = PRESETS[preset]
    return AdapterConfig(
        experts=0, tasks=0, series=(), rank=rank, alpha=alpha, double=double, single=single,
        dropout=dropout,
    )  # fmt: skip
