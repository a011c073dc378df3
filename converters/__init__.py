"""Weights in and out: rule tables between public file layouts and x2jax parameter paths."""

from converters.rules import (
    CONV,
    ID,
    Op,
    Part,
    Rule,
    T,
    Table,
    WeightsError,
    reshape,
    rule,
    swap_halves,
    transpose,
)

__all__ = [
    "CONV",
    "ID",
    "Op",
    "Part",
    "Rule",
    "T",
    "Table",
    "WeightsError",
    "reshape",
    "rule",
    "swap_halves",
    "transpose",
]
