"""Floating point operations of a traced function: matrix products and convolutions, loops unrolled.

XLA's own cost analysis counts the body of a loop once, and blocks lie under `jax.lax.scan`. Here
they count as often as they run, in the backward pass and under remat too. Nothing is compiled.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Of `function` at arguments, which may be `jax.ShapeDtypeStruct`s.

    Of the branches of a condition the costliest counts; a while loop counts as one turn.
    """
    return _jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def _jaxpr(jaxpr: core.Jaxpr) -> int:
    return sum(_equation(e) for e in jaxpr.eqns)


def _equation(e: core.JaxprEqn) -> int:
    shapes: list[Any] = [getattr(x.aval, "shape", ()) for x in e.invars]
    out = math.prod(getattr(e.outvars[0].aval, "shape", ())) if e.outvars else 0
    if e.primitive.name == "dot_general":
        (contracted, _), _ = e.params["dimension_numbers"]
        return 2 * out * math.prod(shapes[0][d] for d in contracted)
    if e.primitive.name == "conv_general_dilated":
        kernel, numbers = shapes[1], e.params["dimension_numbers"]
        # Products with zeros of a dilated input or kernel count too.
        return 2 * out * math.prod(kernel) // kernel[numbers.rhs_spec[0]]
    inner = [_jaxpr(j) for j in map(_open, jax.tree.leaves(list(e.params.values()))) if j]
    if e.primitive.name == "cond":
        return max(inner)
    return e.params.get("length", 1) * sum(inner) if e.primitive.name == "scan" else sum(inner)


def _open(x: Any) -> core.Jaxpr | None:
    if isinstance(x, core.ClosedJaxpr):
        return x.jaxpr
    return x if isinstance(x, core.Jaxpr) else None
