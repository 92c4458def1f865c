"""Tensors that are read when they are needed: what they are is known, their numbers still lie in a file."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from outlook_common.arrays import to_numpy
from outlook_common.weights.io.byte_range import ByteRange

# Bytes that are copied, compared or hashed at a time.
BLOCK = 1 << 20
# Matrices are transposed in squares of this many rows, each first copied to where its rows lie this many numbers
# further apart: rows a power of two apart compete for the same lines of the cache, and NumPy alone takes three times as
# long.
_TILE, _APART = 256, 16


class LazyTensor(ABC):
    """A tensor whose dtype and shape are known and whose numbers are read when asked for, each time anew."""

    def __init__(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self.dtype = dtype
        self.shape = shape

    @property
    def nbytes(self) -> int:
        """How many bytes its numbers take."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def place(self) -> tuple[Path, int] | None:
        """The file and the byte from which on its numbers lie there as they are, row by row; None if they do not."""
        return None

    def seen_as(self, dtype: np.dtype[Any]) -> "LazyTensor":
        """Return the tensor whose numbers have the same bits in another dtype of the same size."""
        return Computed(self, dtype, self.shape, lambda array: array.view(dtype))

    @abstractmethod
    def read(self) -> np.ndarray:
        """Return its numbers; the array may share memory with what is held elsewhere."""

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield its bytes in row-major order, piece by piece; where one piece ends follows from its shape alone."""
        array = self.read()
        if array.flags.c_contiguous:
            flat, end = array.reshape(-1).view(np.uint8), 0
            for size in _piece_sizes(array.shape, array.itemsize):
                start, end = end, end + size
                yield flat[start:end]
            return
        for piece in _pieces(array):
            yield _row_major(piece).reshape(-1).view(np.uint8)


class InMemory(LazyTensor):
    """A tensor that is an array already."""

    def __init__(self, array: np.ndarray) -> None:
        super().__init__(array.dtype, array.shape)
        self._array = array

    def read(self) -> np.ndarray:
        """Return the array."""
        return self._array


class InFile(LazyTensor):
    """A tensor whose numbers lie row by row in a part of a file."""

    def __init__(self, dtype: np.dtype[Any], shape: tuple[int, ...], byte_range: ByteRange) -> None:
        super().__init__(dtype, shape)
        self._extent = byte_range

    @property
    def place(self) -> tuple[Path, int] | None:
        """Where its numbers lie."""
        return None if self._extent.deflated else (self._extent.file.path, self._extent.offset + self._extent.skip)

    def seen_as(self, dtype: np.dtype[Any]) -> LazyTensor:
        """Return the tensor that has the same bytes in another dtype of the same size."""
        return InFile(dtype, self.shape, self._extent)

    def read(self) -> np.ndarray:
        """Return its numbers in memory of their own."""
        array = np.empty(self.shape, self.dtype)
        with self._extent.open() as stream:
            stream.fill(array.reshape(-1).view(np.uint8))
            stream.finish()
        return array

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield its bytes straight from the file."""
        with self._extent.open() as stream:
            for size in _piece_sizes(self.shape, self.dtype.itemsize):
                block = np.empty(size, np.uint8)
                stream.fill(block)
                yield block
            stream.finish()


class Computed(LazyTensor):
    """A tensor that another one gives once read; `compute` may return a view."""

    def __init__(
        self,
        source: LazyTensor,
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
        compute: Callable[[np.ndarray], np.ndarray],
    ) -> None:
        super().__init__(dtype, shape)
        self._source = source
        self._compute = compute

    def read(self) -> np.ndarray:
        """Return what is computed from the numbers of the other."""
        return self._compute(self._source.read())


def stored(value: Any) -> LazyTensor:
    """Return a tensor of a file as it is, and anybody's array or number as one in memory.

    Raises:
        TypeError: it is not made of numbers, or of numbers that NumPy cannot hold; the message says what it is.
    """
    return value if isinstance(value, LazyTensor) else InMemory(to_numpy(value))


def same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays of bytes are equal; eight at a time, which is ten times faster than one by one."""
    whole = len(a) // 8 * 8
    return (
        len(a) == len(b)
        and np.array_equal(a[:whole].view(np.uint64), b[:whole].view(np.uint64))
        and np.array_equal(a[whole:], b[whole:])
    )


def _row_major(array: np.ndarray) -> np.ndarray:
    if array.ndim != 2 or array.flags.c_contiguous:
        return np.ascontiguousarray(array)
    out = np.empty(array.shape, array.dtype)
    turned = np.empty((_TILE, _TILE + _APART), array.dtype)
    for row in range(0, array.shape[0], _TILE):
        for column in range(0, array.shape[1], _TILE):
            tile = np.s_[row : row + _TILE, column : column + _TILE]
            rows, columns = out[tile].shape
            part = turned[:columns, :rows]
            part[...] = array[tile].T
            out[tile] = part.T
    return out


def _pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yield consecutive parts of an array of about `BLOCK` bytes, cut along its first axes."""
    if array.nbytes <= BLOCK or array.ndim == 0:
        yield array
    elif array[0].nbytes > BLOCK:
        for part in array:
            yield from _pieces(part)
    else:
        rows = BLOCK // array[0].nbytes
        for start in range(0, len(array), rows):
            yield array[start : start + rows]


def _piece_sizes(shape: tuple[int, ...], itemsize: int) -> Iterator[int]:
    """Yield how many bytes each of the `_pieces` of such an array has."""
    whole = prod(shape) * itemsize
    if whole <= BLOCK or not shape:
        yield whole
        return
    row = whole // shape[0]
    if row > BLOCK:
        for _ in range(shape[0]):
            yield from _piece_sizes(shape[1:], itemsize)
        return
    rows = BLOCK // row
    for start in range(0, shape[0], rows):
        yield min(rows, shape[0] - start) * row
