"""Lazily loaded tensors that are stored in pieces."""

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from outlook_common.weights.io.lazy import Computed, LazyTensor

# Pieces compared with one another at a time.
_ROWS = 256


@dataclass(frozen=True)
class Piece:
    """A block of a tensor: where it begins along each axis, and its numbers."""

    offsets: tuple[int, ...]
    tensor: LazyTensor


class Joined(LazyTensor):
    """A tensor of blocks that fill it without gaps or overlaps; see `tiling_error`."""

    def __init__(self, dtype: np.dtype[Any], shape: tuple[int, ...], pieces: tuple[Piece, ...]) -> None:
        super().__init__(dtype, shape)
        self._pieces = pieces

    def reshaped(self, shape: tuple[int, ...]) -> LazyTensor:
        """Return the same numbers in another shape."""
        return Computed(self, self.dtype, shape, lambda array: array.reshape(shape))

    def read(self) -> np.ndarray:
        """Return the numbers in new memory, read one block at a time."""
        if len(self._pieces) == 1 and self._pieces[0].tensor.shape == self.shape:
            return self._pieces[0].tensor.read()
        array = np.empty(self.shape, self.dtype)
        for piece in self._pieces:
            block = piece.tensor.read()
            ends = np.add(piece.offsets, block.shape).tolist()
            array[tuple(slice(start, end) for start, end in zip(piece.offsets, ends, strict=True))] = block
        return array


def tiling_error(shape: tuple[int, ...], blocks: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> str | None:
    """Return why blocks, (offsets, sizes) each, do not fill a shape exactly once; None if they do."""
    if any(len(offsets) != len(shape) or len(sizes) != len(shape) for offsets, sizes in blocks):
        return f"a block has other axes than the shape {shape}"
    for offsets, sizes in blocks:
        if any(start + size > whole for start, size, whole in zip(offsets, sizes, shape, strict=True)):
            return f"a block of {sizes} at {offsets} reaches beyond the shape {shape}"
    if (found := sum(prod(sizes) for _, sizes in blocks)) != prod(shape):
        return f"its {len(blocks)} blocks have {found} numbers, the shape {shape} has {prod(shape)}"
    filled = [block for block in blocks if prod(block[1])]
    starts = np.array([offsets for offsets, _ in filled], np.int64).reshape(len(filled), len(shape))
    ends = starts + np.array([sizes for _, sizes in filled], np.int64).reshape(len(filled), len(shape))
    for row in range(0, len(filled), _ROWS):
        some = np.s_[row : row + _ROWS]
        meet = (starts[some, None] < ends[None]) & (starts[None] < ends[some, None])
        if int(meet.all(axis=2).sum()) > len(starts[some]):  # each meets itself
            return "its blocks overlap"
    return None
