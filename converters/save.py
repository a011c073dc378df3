"""Our parameters -> the tensors of a format, on the way to a file."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from converters import safetensors_io
from converters.chunks import chunks
from converters.rules import Part, Table, plan
from converters.safetensors_io import MAX_SHARD, PT, Spec, Tensors


class Parameters(Protocol):
    """Our parameters, wherever they are, read a piece at a time (`converters.load.Imported`).

    Attributes:
      specs: our path -> type and shape.
    """

    specs: dict[str, Spec]

    def read(self, path: str, at: tuple[int | slice, ...]) -> np.ndarray:
        """`ours[path][at]`."""
        ...

    def release(self, path: str) -> None:
        """Gives back what was mapped for an array."""
        ...


class Held:
    """`Parameters` that are arrays: of JAX, of numpy, or mapped from our own file."""

    def __init__(self, params: Mapping[str, Any], keep: int = 2):
        self._params, self._keep = params, keep
        self._arrays: OrderedDict[str, np.ndarray] = OrderedDict()
        self.specs = {p: Spec(np.dtype(x.dtype), tuple(x.shape)) for p, x in params.items()}

    def read(self, path: str, at: tuple[int | slice, ...]) -> np.ndarray:
        value = self._params[path]
        if not isinstance(value, np.ndarray):
            # Tensors of one rule share arrays: the last few stay on the host.
            if path not in self._arrays:
                while len(self._arrays) >= self._keep:
                    self._arrays.popitem(last=False)
                self._arrays[path] = np.asarray(value)
            self._arrays.move_to_end(path)
            value = self._arrays[path]
        return value[at]

    def release(self, path: str) -> None:
        if isinstance(self._params, Tensors):
            self._params.release(path)


class Exported:
    """The tensors of a format, made of our parameters.

    Attributes:
      specs: external name -> type and shape.
    """

    def __init__(self, params: Parameters | Mapping[str, Any], table: Table, dtype: Any = None):
        """Matches parameters with a table; reads nothing yet.

        Args:
          params: complete.
          table: the rules of the format.
          dtype: of every tensor; None keeps each array's own.

        Raises:
          WeightsError: every parameter the format has no place for, and every tensor it lacks.
        """
        self._ours: Parameters = Held(params) if isinstance(params, Mapping) else params
        shapes = {path: spec.shape for path, spec in self._ours.specs.items()}
        self._entries = plan(table, shapes).entries
        self.specs = {
            name: Spec(np.dtype(dtype or self._ours.specs[entry.parts[0].path].dtype), entry.shape)
            for name, entry in self._entries.items()
        }

    def _piece(self, part: Part) -> np.ndarray:
        return part.inverse(self._ours.read(part.path, part.at))

    def __call__(self, name: str) -> np.ndarray:
        """One tensor, whole."""
        entry, spec = self._entries[name], self.specs[name]
        return np.ascontiguousarray(entry.assemble(self._read), spec.dtype).reshape(spec.shape)

    def _read(self, part: Part) -> np.ndarray:
        return self._ours.read(part.path, part.at)

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """One tensor as runs of its rows."""
        entry = self._entries[name]
        pieces = [self._piece(p) for p in entry.parts]
        axis = 0 if entry.split is None else entry.split[0]
        yield from chunks(pieces, axis, self.specs[name].dtype)
        for part in entry.parts:
            self._ours.release(part.path)


def save(
    params: Mapping[str, Any],
    table: Table,
    out: str | Path,
    dtype: Any = None,
    metadata: Mapping[str, Any] | None = PT,
    *,
    max_shard: int | None = MAX_SHARD,
) -> list[Path]:
    """Writes our parameters in an external format, piece by piece, atomically.

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
      WeightsError: as `Exported`.
    """
    found = Exported(params, table, dtype)
    return safetensors_io.write(
        out, found.specs, found.chunks, metadata=metadata, max_shard=max_shard
    )
