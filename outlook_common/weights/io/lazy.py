"""Lazily loaded tensors."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from outlook_common.arrays import to_numpy
from outlook_common.weights.io.byte_range import ByteRange

# Bytes copied, compared or hashed at a time.
BLOCK = 1 << 20
# Matrices are transposed in square tiles of so many rows, each first copied to a buffer whose rows are padded by so
# many numbers: rows a power of two apart compete for cache lines, so that NumPy alone takes three times as long.
_TILE, _PADDING = 256, 16


class LazyTensor(ABC):
    """A tensor with known dtype and shape whose numbers are read on request, each time anew."""

    def __init__(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self.dtype = dtype
        self.shape = shape

    @property
    def nbytes(self) -> int:
        """Size of the numbers in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def position(self) -> tuple[Path, int] | None:
        """(file, first byte) of the numbers if they are stored there unpacked in row-major order; else None."""
        return None

    def view_as(self, dtype: np.dtype[Any]) -> "LazyTensor":
        """Return the tensor with the same bits in another dtype of the same size."""
        return Computed(self, dtype, self.shape, lambda array: array.view(dtype))

    @abstractmethod
    def read(self) -> np.ndarray:
        """Return the numbers; the array may share memory with other arrays."""

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield the bytes in row-major order; the sizes of the blocks follow from dtype and shape alone."""
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
    """An array in memory."""

    def __init__(self, array: np.ndarray) -> None:
        super().__init__(array.dtype, array.shape)
        self._array = array

    def read(self) -> np.ndarray:
        """Return the array."""
        return self._array


class InFile(LazyTensor):
    """A tensor stored in row-major order in a part of a file."""

    def __init__(self, dtype: np.dtype[Any], shape: tuple[int, ...], byte_range: ByteRange) -> None:
        super().__init__(dtype, shape)
        self._byte_range = byte_range

    @property
    def position(self) -> tuple[Path, int] | None:
        """(file, first byte) of the numbers; None if they are packed."""
        return (
            None
            if self._byte_range.deflated
            else (self._byte_range.file.path, self._byte_range.offset + self._byte_range.skip)
        )

    def view_as(self, dtype: np.dtype[Any]) -> LazyTensor:
        """Return the tensor with the same bits in another dtype of the same size."""
        return InFile(dtype, self.shape, self._byte_range)

    def read(self) -> np.ndarray:
        """Return the numbers in new memory."""
        array = np.empty(self.shape, self.dtype)
        with self._byte_range.open() as stream:
            stream.fill(array.reshape(-1).view(np.uint8))
            stream.finish()
        return array

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield the bytes straight from the file."""
        with self._byte_range.open() as stream:
            for size in _piece_sizes(self.shape, self.dtype.itemsize):
                block = np.empty(size, np.uint8)
                stream.fill(block)
                yield block
            stream.finish()


class Computed(LazyTensor):
    """A tensor computed from another one when it is read; `compute` may return a view."""

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
        """Return the computed numbers."""
        return self._compute(self._source.read())


class Joined(LazyTensor):
    """Tensors of one dtype one after the other along their first axis."""

    def __init__(self, parts: Sequence[LazyTensor]) -> None:
        super().__init__(parts[0].dtype, (sum(part.shape[0] for part in parts), *parts[0].shape[1:]))
        if unlike := [part for part in parts if (part.dtype, part.shape[1:]) != (self.dtype, self.shape[1:])]:
            raise ValueError(f"{unlike[0].dtype} of shape {unlike[0].shape} cannot follow {parts[0].shape}")
        self._parts = parts

    def read(self) -> np.ndarray:
        """Return the numbers in new memory."""
        return np.concatenate([part.read() for part in self._parts])


def as_lazy(value: Any) -> LazyTensor:
    """Return a LazyTensor unchanged; wrap an array or number of NumPy, PyTorch or JAX.

    Raises:
        TypeError: it is not numeric, or of a dtype that NumPy lacks; the message says what it is.
    """
    return value if isinstance(value, LazyTensor) else InMemory(to_numpy(value))


def same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays of bytes are equal; compared eight at a time, ten times faster than one by one."""
    aligned = len(a) // 8 * 8
    return (
        len(a) == len(b)
        and np.array_equal(a[:aligned].view(np.uint64), b[:aligned].view(np.uint64))
        and np.array_equal(a[aligned:], b[aligned:])
    )


def _row_major(array: np.ndarray) -> np.ndarray:
    if array.ndim != 2 or array.flags.c_contiguous:
        return np.ascontiguousarray(array)
    out = np.empty(array.shape, array.dtype)
    buffer = np.empty((_TILE, _TILE + _PADDING), array.dtype)
    for row in range(0, array.shape[0], _TILE):
        for column in range(0, array.shape[1], _TILE):
            tile = np.s_[row : row + _TILE, column : column + _TILE]
            rows, columns = out[tile].shape
            part = buffer[:columns, :rows]
            part[...] = array[tile].T
            out[tile] = part.T
    return out


def _pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yield consecutive parts of an array, each about `BLOCK` bytes, cut along its first axes."""
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
    """Yield the size in bytes of each of the `_pieces` of an array."""
    total = prod(shape) * itemsize
    if total <= BLOCK or not shape:
        yield total
        return
    row = total // shape[0]
    if row > BLOCK:
        for _ in range(shape[0]):
            yield from _piece_sizes(shape[1:], itemsize)
        return
    rows = BLOCK // row
    for start in range(0, shape[0], rows):
        yield min(rows, shape[0] - start) * row
