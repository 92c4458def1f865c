"""Dropout masks shared by both twins: the n-th draw of a training step is the same in both. Imports no framework."""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Draw:
    """One draw of uniform random numbers: the module that drew, and the shape."""

    where: str
    shape: tuple[int, ...]


# Twins may order the axes of a map (batch, height, width, channels), a sequence (batch, steps, channels) or attention
# weights (batch, heads, position, position) differently. So a mask with so many axes is the same in any order of them:
# drawn with the shorter axes first, and symmetric in those of one length.
ANY_ORDER = range(3, 6)


def _in_order(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(shape)) if len(shape) in ANY_ORDER else tuple(shape)


def _symmetric(numbers: np.ndarray) -> np.ndarray:
    """Return numbers, whose axes are sorted by length, made symmetric in the axes of one length."""
    index: list[np.ndarray] = list(np.ogrid[tuple(map(slice, numbers.shape))])
    for length in set(numbers.shape) - {1}:
        axes = [axis for axis, size in enumerate(numbers.shape) if size == length]
        if len(axes) > 1:
            positions = np.sort(np.stack(np.broadcast_arrays(*(index[axis] for axis in axes))), axis=0)
            for axis, position in zip(axes, positions, strict=True):
                index[axis] = position
    return numbers[tuple(index)]


@dataclass
class Draws:
    """The random numbers of one training step, in the order of the calls.

    Attributes:
        seed: of all of them.
        drawn: the draws since the step began.
    """

    seed: int
    drawn: list[Draw] = field(default_factory=list)

    def begin(self) -> None:
        """Begin a step: the next draw is the first."""
        self.drawn.clear()

    def uniform(self, shape: tuple[int, ...], where: str) -> np.ndarray:
        """Return numbers in [0, 1), float32 as float64, so that twins compare them with a rate alike."""
        kept = _in_order(shape)
        numbers = np.random.default_rng([self.seed, len(self.drawn)]).random(kept, np.float32)
        self.drawn.append(Draw(where, kept))
        if len(kept) in ANY_ORDER:
            numbers = _symmetric(numbers).transpose(np.argsort(np.argsort(shape, kind="stable")))
        return numbers.astype(np.float64)

    def mask(self, shape: tuple[int, ...], rate: float, where: str) -> np.ndarray:
        """Return a dropout mask of 0 and 1/(1-rate)."""
        kept = self.uniform(shape, where) >= rate
        return kept / (1 - rate) if rate < 1 else np.zeros(shape)
