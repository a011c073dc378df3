"""Parameters by their `/`-joined path: the key for freezing, sharding, conversion and logging."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

Params = dict[str, Any]
"""Path -> array, ShapeDtypeStruct or sharding."""


class Skeleton:
    """A module without its arrays: what `jit` closes over, while arrays travel as `Params`."""

    def __init__(self, module: nnx.Module):
        self.graphdef, state = nnx.split(module)
        leaves, self.treedef = jax.tree.flatten(state)
        self.paths = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]
        self.abstract: Params = dict(zip(self.paths, leaves, strict=True))

    def merge(self, *params: Params) -> Any:
        """The module with the arrays of disjoint parts put back, by path."""
        leaves = [next(p[path] for p in params if path in p) for path in self.paths]
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves))


def state_params(module: nnx.Module) -> Params:
    """The arrays of a module, by path."""
    return {"/".join(map(str, p)): v.get_value() for p, v in nnx.to_flat_state(nnx.state(module))}


def child(params: Params, name: str) -> Params:
    """The parameters below one child, paths relative to it."""
    return {p.removeprefix(name + "/"): v for p, v in params.items() if p.startswith(name + "/")}


def prefixed(params: Params, name: str) -> Params:
    """Inverse of `child`."""
    return {f"{name}/{p}": v for p, v in params.items()}


def matches(path: str, rules: Iterable[str]) -> bool:
    """Whether a path matches one of the regular expressions, whole."""
    return any(re.fullmatch(rule, path) for rule in rules)


def check_rules(paths: Iterable[str], rules: Iterable[str], what: str) -> None:
    """Raises ValueError if a rule matches no path: it is a typing error, not a choice."""
    paths = list(paths)
    idle = [r for r in rules if not any(re.fullmatch(r, p) for p in paths)]
    if idle:
        heads = sorted({p.split("/")[0] for p in paths})
        raise ValueError(f"{what}: {idle} match no parameter; parameters start with {heads}")


def nbytes(tree: Any) -> int:
    """Bytes of all arrays (or shapes) in a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def fingerprint(params: Mapping[str, Any]) -> str:
    """A short hash of names, shapes and evenly spaced values: tells sets of weights apart.

    Reads at most 1024 values of each array, so 24 GB cost little more than 24 MB.
    """
    spaced = {}
    for path, value in params.items():
        at = spaced_out(value.size)
        spaced[path] = value.shape, value.reshape(-1)[:: at.step][: len(at)]
    return fingerprint_of(spaced)


def spaced_out(size: int, samples: int = 1024) -> range:
    """Which values of a flat array of some size a fingerprint is made of."""
    return range(0, size, max(1, size // samples))[:samples]


def fingerprint_of(spaced: Mapping[str, tuple[tuple[int, ...], Any]]) -> str:
    """`fingerprint` of path -> (shape, values at `spaced_out`)."""
    digest = hashlib.sha256()
    for path, (shape, values) in sorted(spaced.items()):
        digest.update(f"{path}{tuple(shape)}".encode())
        digest.update(np.asarray(values, np.float32).tobytes())
    return digest.hexdigest()[:16]
