"""Layouts of weights: parts of arrays, and the orders of axes and shapes that are known. Imports no framework."""

import math
from collections.abc import Iterable, Iterator
from itertools import permutations
from typing import NamedTuple

import numpy as np

from outlook_parity.core.layout import Axes, channels_last

Shape = tuple[int, ...]


class Part(NamedTuple):
    """A part of an array along one axis.

    Attributes:
        axis: the axis that is cut.
        start: the first index.
        stop: the index after the last.
        size: the length of the axis of the whole array.
        dropped: whether the part, of one index, has no such axis: a layer of a stack.
    """

    axis: int
    start: int
    stop: int
    size: int
    dropped: bool = False

    def take(self, array: np.ndarray) -> np.ndarray:
        """Return this part of an array, as a view."""
        before = (slice(None),) * self.axis
        return array[(*before, self.start if self.dropped else slice(self.start, self.stop), ...)]

    def shape(self, whole: Shape) -> Shape:
        """Return the shape of this part of an array."""
        here = () if self.dropped else (self.stop - self.start,)
        return (*whole[: self.axis], *here, *whole[self.axis + 1 :])

    def whole(self, part: Shape) -> Shape:
        """Return the shape of the whole array."""
        return (*part[: self.axis], self.size, *part[self.axis + (not self.dropped) :])


Parts = tuple[Part, ...]  # from the outermost to the innermost


def part_of(array: np.ndarray, parts: Parts) -> np.ndarray:
    """Return a part of an array, as a view."""
    for part in parts:
        array = part.take(array)
    return array


def assembled(pieces: Iterable[tuple[Parts, np.ndarray]]) -> np.ndarray | None:
    """Return an array made of its parts; None if parts are missing or do not fit."""
    whole: np.ndarray | None = None
    filled = 0
    for parts, piece in pieces:
        if whole is None:
            shape = piece.shape
            for part in reversed(parts):
                shape = part.whole(shape)
            whole = np.empty(shape, piece.dtype)
        view = part_of(whole, parts)
        if view.shape != piece.shape:
            return None
        view[...] = piece
        filled += piece.size
    return whole if whole is not None and filled == whole.size else None


# Type of PyTorch's module -> the order in which Flax has the axes of its `weight`; of any other the same.
KERNEL_AXES: dict[str, Axes] = {
    "Linear": (1, 0),
    "NonDynamicallyQuantizableLinear": (1, 0),  # the output projection of PyTorch's MultiheadAttention
    "Conv1d": (2, 1, 0),
    "Conv2d": (2, 3, 1, 0),
    "Conv3d": (2, 3, 4, 1, 0),
    "ConvTranspose1d": (2, 0, 1),
    "ConvTranspose2d": (2, 3, 0, 1),
    "ConvTranspose3d": (2, 3, 4, 0, 1),
}

# GPT-2's Conv1D, which has its weight as Flax's Dense does; Hugging Face's twin of it has it turned.
TURNED_IN_FLAX = {"Conv1D": (1, 0)}

# The leaves of Flax, Haiku and Keras that have the layout of Flax; others (Equinox, functions) may have PyTorch's.
KERNELS = ("kernel", "w")


def usual_axes(kind: str, leaf: str, ndim: int) -> list[Axes | None]:
    """Return the known orders of axes of a weight, the most usual first; None is PyTorch's own.

    Args:
        kind: the type of PyTorch's module.
        leaf: the last part of the name in JAX.
        ndim: the number of axes in PyTorch.
    """
    usual = KERNEL_AXES.get(kind)
    if usual is None or len(usual) != ndim:
        turned = TURNED_IN_FLAX.get(kind)
        usual_or_not: list[Axes | None] = [None] if turned is None or ndim != 2 else [None, turned]
        return usual_or_not
    return [usual, None] if leaf in KERNELS else [None, usual]


def other_axes(shape: Shape) -> Iterator[Axes]:
    """Return orders of axes that the shapes of modules of unknown type can tell: those of axes of different length."""
    ndim = len(shape)
    if ndim > 2:
        yield channels_last(ndim)
    if 1 < ndim < 5 and len(set(shape)) == ndim:
        yield from permutations(range(ndim))


def permuted(shape: Shape, axes: Axes | None) -> Shape:
    """Return the shape after a permutation of the axes."""
    return shape if axes is None else tuple(shape[axis] for axis in axes)


def regroups(one: Shape, other: Shape) -> bool:
    """Whether one shape has axes of the other split, as heads are, or is the other with axes of length 1."""
    one, other = (tuple(size for size in shape if size != 1) for shape in (one, other))
    fine, coarse = (one, other) if len(one) >= len(other) else (other, one)
    if math.prod(fine) != math.prod(coarse):
        return False
    position = 0
    for size in coarse:
        reached = 1
        while reached < size and position < len(fine):
            reached *= fine[position]
            position += 1
        if reached != size:
            return False
    return position == len(fine)
