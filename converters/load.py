"""Moves tensors between files and our parameters, one array at a time."""

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from converters import pickles, safetensors_io
from converters.rules import Entry, Part, Plan, Table, WeightsError, plan
from converters.safetensors_io import MAX_SHARD, PT, Spec, Tensors

Source = str | Path | Mapping[str, np.ndarray]
WRAPPERS = ("module.",)
"""Prefixes that training wrappers put before every name."""


def open_weights(source: Source) -> Tensors:
    """Tensors by name from a file, a folder or a mapping; read when used where the format allows.

    Names lose the `module.` that data-parallel wrappers put before all of them.

    Args:
      source: a safetensors file, its index or folder; a torch pickle; or names and arrays.

    Raises:
      FileNotFoundError: nothing there.
      WeightsError: damaged, or ambiguous.
      ImportError: a pickle, and torch is not installed.
    """
    if isinstance(source, Mapping):
        where = source.where if isinstance(source, Tensors) else "memory"
        return _unwrap(Tensors(source, where, getattr(source, "metadata", None)))
    path = Path(source).expanduser()
    if path.is_dir() and not any(path.glob("*.safetensors*")):
        found = sorted(p for s in pickles.SUFFIXES for p in path.glob(f"*{s}"))
        if len(found) > 1:
            names = ", ".join(p.name for p in found)
            raise WeightsError(f"weights in {path}", [f"ambiguous: {names}; name one file"])
        path = found[0] if found else path
    if path.suffix in pickles.SUFFIXES and path.is_file():
        return _unwrap(pickles.read(path))
    return _unwrap(safetensors_io.open_tensors(path))


def _unwrap(tensors: Tensors) -> Tensors:
    for prefix in WRAPPERS:
        if tensors and all(name.startswith(prefix) for name in tensors):
            named = {name.removeprefix(prefix): x for name, x in tensors.items()}
            return Tensors(named, tensors.where, tensors.metadata)
    return tensors


def check(source: Tensors, table: Table, ours: Mapping[str, Any]) -> Plan:
    """Matches a source with a table and our arrays, before anything is read.

    Raises:
      WeightsError: every offender.
    """
    external = {name: tuple(x.shape) for name, x in source.items()}
    problems: list[str] = [
        f"mis-typed: {name} is {x.dtype}, expected floating point"
        for name, x in source.items()
        if not _floating(x.dtype) and not table.ignores(name)
    ]
    try:
        found = plan(table, {path: tuple(x.shape) for path, x in ours.items()}, external)
    except WeightsError as e:
        problems += e.problems
    if problems:
        raise WeightsError(f"{table.name} weights in {source.where}", problems)
    return found


def _floating(dtype) -> bool:
    try:
        return bool(ml_dtypes.finfo(dtype))  # knows bfloat16 and float8 besides numpy's own
    except ValueError:
        return False


def load(
    source: Source,
    table: Table,
    abstract: Mapping[str, Any],
    dtype: Any = None,
) -> dict[str, jax.Array]:
    """Reads weights straight into device arrays; the host holds one array, or one shard, at a time.

    Args:
      source: as `open_weights` takes it.
      table: the rules of its format.
      abstract: our path -> `jax.ShapeDtypeStruct`, complete; a `.sharding` on it is where it goes.
      dtype: of the result; None for the dtypes in `abstract`.

    Returns:
      Our path -> array.

    Raises:
      WeightsError: every unknown, missing, mis-shaped, mis-typed, doubly filled or ambiguous
        tensor; nothing has been read then.
    """
    tensors = open_weights(source)
    by_path = check(tensors, table, abstract).by_path()
    return {
        path: _array(tensors, path, by_path[path], x, dtype or x.dtype)
        for path, x in abstract.items()
    }


def load_numpy(
    source: Source, table: Table, abstract: Mapping[str, Any], dtype: Any = None
) -> dict[str, np.ndarray]:
    """`load` into host arrays: for conversion and tests of small models."""
    tensors = open_weights(source)
    by_path = check(tensors, table, abstract).by_path()
    return {
        path: _block(tensors, path, by_path[path], x.shape, _full(x.shape), dtype or x.dtype)
        for path, x in abstract.items()
    }


def importer(
    source: Source, table: Table, shapes: Mapping[str, tuple[int, ...]], dtype: Any = None
):
    """What an import will hold: (our path -> Spec, function that gives an array by path, ignored).

    Args:
      source: as `open_weights` takes it.
      table: the rules of its format.
      shapes: our path -> shape, complete.
      dtype: of the result; None keeps each tensor's own.

    Raises:
      WeightsError: as `load`.
    """
    tensors = open_weights(source)
    found = check(
        tensors, table, {p: jax.ShapeDtypeStruct(s, np.float32) for p, s in shapes.items()}
    )
    entries = found.by_path()
    specs = {
        path: Spec(np.dtype(dtype or tensors[entries[path][0].name].dtype), shape)
        for path, shape in shapes.items()
    }

    def read(path: str) -> np.ndarray:
        shape = specs[path].shape
        return _block(tensors, path, entries[path], shape, _full(shape), specs[path].dtype)

    return specs, read, found.ignored


def _full(shape) -> tuple[slice, ...]:
    return tuple(slice(0, n) for n in shape)


def _array(tensors, path, entries: list[Entry], x, dtype) -> jax.Array:
    sharding = getattr(x, "sharding", None)
    if sharding is None:
        return jax.device_put(_block(tensors, path, entries, x.shape, _full(x.shape), dtype))
    kept: dict[tuple, np.ndarray] = {}

    def shard(index):
        bounds = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, x.shape, strict=True))
        key = tuple((s.start, s.stop) for s in bounds)
        if key not in kept:
            # Replicas ask for the same block again, one device after another.
            kept.clear()
            kept[key] = _block(tensors, path, entries, x.shape, bounds, dtype)
        return kept[key]

    return jax.make_array_from_callback(x.shape, sharding, shard)


def _block(tensors, path, entries: list[Entry], shape, bounds, dtype) -> np.ndarray:
    """`ours[path][bounds]`; reads only what lies in it."""
    out = np.empty([s.stop - s.start for s in bounds], dtype)
    for entry in entries:
        if not any(p.path == path and _meets(p, bounds) for p in entry.parts):
            continue
        for part, piece in entry.pieces(tensors[entry.name]):
            if part.path != path or not _meets(part, bounds):
                continue
            target, inner = [], []
            for axis, bound in enumerate(bounds):
                at = part.at[axis] if axis < len(part.at) else slice(None)
                if isinstance(at, slice):
                    target.append(slice(None))
                    inner.append(bound)
                else:
                    target.append(at - bound.start)
            out[tuple(target)] = piece[tuple(inner)]
    return out


def _meets(part: Part, bounds) -> bool:
    return all(
        isinstance(at, slice) or bound.start <= at < bound.stop
        for at, bound in zip(part.at, bounds, strict=False)
    )


class _Host:
    """Our arrays on the host, the last few used: tensors of one rule share arrays."""

    def __init__(self, params: Mapping[str, Any], keep: int = 2):
        self.params, self.keep = params, keep
        self.arrays: OrderedDict[str, np.ndarray] = OrderedDict()

    def read(self, part: Part) -> np.ndarray:
        value = self.params[part.path]
        if not isinstance(value, np.ndarray):
            if part.path not in self.arrays:
                while len(self.arrays) >= self.keep:
                    self.arrays.popitem(last=False)
                self.arrays[part.path] = np.asarray(value)
            self.arrays.move_to_end(part.path)
            value = self.arrays[part.path]
        return value[part.at]


def save(
    params: Mapping[str, Any],
    table: Table,
    out: str | Path,
    dtype: Any = None,
    metadata: Mapping[str, Any] | None = PT,
    *,
    max_shard: int = MAX_SHARD,
) -> list[Path]:
    """Writes our parameters in an external format, tensor by tensor, atomically.

    Args:
      params: our path -> array (JAX or numpy), complete.
      table: the rules of the format.
      out: the `.safetensors` file; above `max_shard` bytes it becomes shards with an index.
      dtype: to cast to; None keeps each array's own.
      metadata: of the safetensors header; None for none.
      max_shard: bytes of the largest file.

    Returns:
      The files written.

    Raises:
      WeightsError: every parameter the format has no place for, and every tensor it lacks.
    """
    entries, read = exporter(params, table, dtype)
    return safetensors_io.write(out, entries, read, metadata=metadata, max_shard=max_shard)


def exporter(params: Mapping[str, Any], table: Table, dtype: Any = None):
    """What an export will hold: (name -> Spec, function that gives a tensor by name)."""
    found = plan(table, {path: tuple(x.shape) for path, x in params.items()})
    host = _Host(params)
    specs = {
        name: Spec(np.dtype(dtype or params[entry.parts[0].path].dtype), entry.shape)
        for name, entry in found.entries.items()
    }

    def read(name: str) -> np.ndarray:
        tensor = found.entries[name].assemble(host.read)
        return np.ascontiguousarray(tensor, specs[name].dtype).reshape(specs[name].shape)

    return specs, read
