"""Files -> our parameters, on devices, on the host, or in pieces on the way to another file."""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from converters import pickles, safetensors_io
from converters.chunks import CHUNK, chunks, contiguous
from converters.rules import FULL, Entry, Part, Plan, Table, WeightsError, plan
from converters.safetensors_io import Spec, Tensors
from converters.single_file import FLOAT8

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
        return source if isinstance(source, Tensors) else _unwrap(Tensors(source, "memory"))
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
            spans = {name.removeprefix(prefix): x for name, x in tensors.spans.items()}
            return Tensors(named, tensors.where, tensors.metadata, spans=spans)
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


class Imported:
    """Our parameters in a file of others, read a piece at a time.

    Attributes:
      specs: our path -> type and shape.
      ignored: names in the file that are known, and not needed.
    """

    def __init__(
        self, source: Source, table: Table, shapes: Mapping[str, tuple[int, ...]], dtype: Any = None
    ):
        """Matches a source with a table; reads nothing yet.

        Args:
          source: as `open_weights` takes it.
          table: the rules of its format.
          shapes: our path -> shape, complete.
          dtype: of the result; None keeps each tensor's own (the widest of those that share an
            array), and makes bfloat16 of float8.

        Raises:
          WeightsError: every unknown, missing, mis-shaped, mis-typed, doubly filled or ambiguous
            tensor.
        """
        self._tensors = open_weights(source)
        wanted = {p: jax.ShapeDtypeStruct(s, np.float32) for p, s in shapes.items()}
        found = check(self._tensors, table, wanted)
        self._entries = found.by_path()
        self.ignored = (*self._tensors.ignored, *found.ignored)
        self.specs = {
            path: Spec(np.dtype(dtype) if dtype else self._dtype(path), shape)
            for path, shape in shapes.items()
        }

    def _dtype(self, path: str) -> np.dtype:
        kinds = {self._tensors[e.name].dtype for e in self._entries[path]}
        kinds = {np.dtype(ml_dtypes.bfloat16) if k in FLOAT8 else k for k in kinds}
        return np.dtype(jnp.result_type(*kinds)) if len(kinds) > 1 else kinds.pop()

    def __call__(self, path: str) -> np.ndarray:
        """One array, whole."""
        return self.block(path, _full(self.specs[path].shape))

    def read(self, path: str, at: tuple[int | slice, ...]) -> np.ndarray:
        """`ours[path][at]` in the file's own type if one tensor holds it, else in ours."""
        for entry in self._entries[path]:
            name = entry.name
            if name not in self._tensors.scales and any(p.at == at for p in entry.parts):
                pieces = entry.pieces(self._tensors[name])
                return next(x for p, x in pieces if p.path == path and p.at == at)
        shape = self.specs[path].shape
        bounds = [
            slice(a, a + 1) if isinstance(a, int) else slice(0, n)
            for a, n in zip((*at, *[FULL] * (len(shape) - len(at))), shape, strict=True)
        ]
        block = self.block(path, tuple(bounds))
        return block[tuple(0 if isinstance(a, int) else FULL for a in at)]

    def chunks(self, path: str) -> Iterator[np.ndarray]:
        """One array as runs of its rows; gives back what was mapped for it."""
        spec, entries = self.specs[path], self._entries[path]
        stacked = all(p.at and isinstance(p.at[0], int) for e in entries for p in _of(e, path))
        ats = [(i,) for i in range(spec.shape[0])] if stacked and spec.nbytes > CHUNK else [()]
        for at in ats:
            yield from chunks([self.read(path, at)], 0, spec.dtype)
            for entry in entries:
                if not at or any(p.at[0] == at[0] for p in _of(entry, path)):
                    self._tensors.release(entry.name)

    def release(self, path: str) -> None:
        """Gives back what was mapped for an array."""
        for entry in self._entries[path]:
            self._tensors.release(entry.name)

    def block(self, path: str, bounds: tuple[slice, ...]) -> np.ndarray:
        """`ours[path][bounds]`; reads only what lies in it."""
        out = np.empty([s.stop - s.start for s in bounds], self.specs[path].dtype)
        for entry in self._entries[path]:
            if not any(_meets(p, bounds) for p in _of(entry, path)):
                continue
            scale = self._tensors.scales.get(entry.name)
            for part, piece in entry.pieces(self._tensors[entry.name]):
                if part.path != path or not _meets(part, bounds):
                    continue
                target, inner = [], []
                for axis, bound in enumerate(bounds):
                    at = part.at[axis] if axis < len(part.at) else FULL
                    if isinstance(at, slice):
                        target.append(FULL)
                        inner.append(bound)
                    else:
                        target.append(at - bound.start)
                value = contiguous(piece[tuple(inner)], piece.dtype)
                if scale is not None:
                    value = value.astype(np.float32) * np.float32(scale)
                out[tuple(target)] = value
        return out


def load(
    source: Source,
    table: Table,
    abstract: Mapping[str, Any],
    dtype: Any = None,
) -> dict[str, jax.Array]:
    """Reads weights straight into device arrays; the host holds one block, or one array, at a time.

    Args:
      source: as `open_weights` takes it.
      table: the rules of its format.
      abstract: our path -> `jax.ShapeDtypeStruct`, complete; a `.sharding` on it is where it goes.
      dtype: of the result; None for the dtypes in `abstract`.

    Returns:
      Our path -> array.

    Raises:
      WeightsError: as `Imported`; nothing has been read then.
    """
    shapes = {path: tuple(x.shape) for path, x in abstract.items()}
    found = Imported(source, table, shapes)
    out = {}
    for path, x in abstract.items():
        found.specs[path] = Spec(np.dtype(dtype or x.dtype), shapes[path])
        out[path] = _array(found, path, getattr(x, "sharding", None))
        found.release(path)
    return out


def load_numpy(
    source: Source, table: Table, abstract: Mapping[str, Any], dtype: Any = None
) -> dict[str, np.ndarray]:
    """`load` into host arrays: for conversion and tests of small models."""
    shapes = {path: tuple(x.shape) for path, x in abstract.items()}
    found = Imported(source, table, shapes)
    found.specs |= {p: Spec(np.dtype(dtype or x.dtype), shapes[p]) for p, x in abstract.items()}
    return {path: found(path) for path in abstract}


def _full(shape) -> tuple[slice, ...]:
    return tuple(slice(0, n) for n in shape)


def _array(found: Imported, path: str, sharding: Any) -> jax.Array:
    if sharding is None:
        return jax.device_put(found(path))
    shape = found.specs[path].shape
    places: dict[tuple, list] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, shape, strict=True))
        places.setdefault(tuple((s.start, s.stop) for s in bounds), []).append(device)
    shards = []
    for key, devices in places.items():
        shards += _shards(found, path, tuple(slice(*ends) for ends in key), devices)
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _shards(found: Imported, path: str, bounds: tuple[slice, ...], devices) -> list[jax.Array]:
    """One block on each of some devices; a large one arrives a row at a time, joined there."""
    spec = Spec(found.specs[path].dtype, tuple(s.stop - s.start for s in bounds))
    if spec.nbytes <= 4 * CHUNK or len(bounds) < 3:
        block = found.block(path, bounds)
        return [jax.device_put(block, device) for device in devices]
    out = [jnp.zeros(spec.shape, spec.dtype, device=device) for device in devices]
    for i in range(spec.shape[0]):
        row = slice(bounds[0].start + i, bounds[0].start + i + 1)
        block = found.block(path, (row, *bounds[1:]))
        for k, device in enumerate(devices):
            out[k] = _set_row(out[k], jax.device_put(block, device), i)
        found.release(path)
        jax.block_until_ready(out)  # or rows would pile up on the host
    return out


@functools.partial(jax.jit, donate_argnums=0)
def _set_row(whole, row, i):
    return jax.lax.dynamic_update_slice_in_dim(whole, row, i, 0)


def _of(entry: Entry, path: str) -> list[Part]:
    return [p for p in entry.parts if p.path == path]


def _meets(part: Part, bounds) -> bool:
    return all(
        isinstance(at, slice) or bound.start <= at < bound.stop
        for at, bound in zip(part.at, bounds, strict=False)
    )
