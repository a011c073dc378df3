"""Arrays as the bytes of a file, a few megabytes at a time."""

import functools
import mmap
from collections.abc import Iterator, Sequence

import jax
import numpy as np

CHUNK = 16 << 20
"""Bytes of a chunk, about."""
_LARGE = 1 << 20
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def chunks(
    pieces: Sequence[np.ndarray], axis: int, dtype: np.dtype, size: int = CHUNK
) -> Iterator[np.ndarray]:
    """The concatenation of pieces along an axis, in C order, as contiguous runs of its rows.

    Args:
      pieces: any strides; they may lie in a mapped file.
      axis: along which they are joined.
      dtype: of the chunks.
      size: bytes of a chunk, about; a row is never cut.
    """
    if axis == 0 or len(pieces) == 1:
        for piece in pieces:
            if piece.ndim == 0:
                yield contiguous(piece, dtype).reshape(1)
                continue
            _touch(piece)
            for rows in _rows([piece], dtype, size):
                yield contiguous(piece[rows], dtype)
        return
    for piece in pieces:
        _touch(piece)
    for rows in _rows(pieces, dtype, size):
        yield np.concatenate([contiguous(p[rows], dtype) for p in pieces], axis)


def _touch(x: np.ndarray) -> None:
    """Reads a value of each page of a transposed matrix, in the order of its file.

    Its rows are columns of the file: read so, a mapped file that is not in memory yet would come
    from the disk a page at a time.
    """
    kind = _UNSIGNED.get(x.dtype.itemsize)
    if kind is not None and not x.flags.c_contiguous and x.nbytes >= _LARGE:
        order = sorted(range(x.ndim), key=lambda axis: -x.strides[axis])
        x.view(kind).transpose(order)[..., :: mmap.PAGESIZE // x.dtype.itemsize].max()


def _rows(pieces: Sequence[np.ndarray], dtype: np.dtype, size: int) -> Iterator[slice]:
    count = pieces[0].shape[0]
    row = sum(p.size for p in pieces) // max(count, 1) * dtype.itemsize
    step = max(1, size // max(row, 1))
    for begin in range(0, count, step):
        yield slice(begin, begin + step)


def contiguous(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`np.ascontiguousarray`, through XLA's transposer where that is faster.

    numpy moves the elements of a transposed matrix one at a time; XLA moves them in vector
    registers, several times as fast (`benchmarks/convert_speed.py` prints both).
    """
    kind = _UNSIGNED.get(x.dtype.itemsize)
    small = x.flags.c_contiguous or x.size < 1 << 16
    if small or kind is None or not x.flags.aligned or (cpu := _cpu()) is None:
        return np.ascontiguousarray(x, dtype)
    moved = np.asarray(jax.device_put(x.view(kind), cpu)).view(x.dtype)
    return moved.astype(dtype, copy=False)


@functools.cache
def _cpu():
    """JAX's CPU; None where the user has left it out of JAX_PLATFORMS."""
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:
        return None
