"""Dropout masks that both twins share: the n-th draw of a training step is the same in either. Imports no framework."""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Draw:
    """One draw of random numbers, uniform in 0…1: where in the model, and of which shape."""

    where: str
    shape: tuple[int, ...]


# In which order a map (batch, height, width, channels), a sequence (batch, steps, channels) or the weights of
# self-attention (batch, heads, place, place) has its axes is each twin's own affair. So a mask of so many axes is the
# same read in any order of them: drawn with the shorter axes first, and symmetric in those of one length.
ANY_ORDER = range(3, 6)


def _in_order(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(shape)) if len(shape) in ANY_ORDER else tuple(shape)


def _symmetric(numbers: np.ndarray) -> np.ndarray:
    """Return numbers, whose axes are sorted by length, made the same whichever of those of one length comes first."""
    index: list[np.ndarray] = list(np.ogrid[tuple(map(slice, numbers.shape))])
    for length in set(numbers.shape) - {1}:
        axes = [axis for axis, size in enumerate(numbers.shape) if size == length]
        if len(axes) > 1:
            places = np.sort(np.stack(np.broadcast_arrays(*(index[axis] for axis in axes))), axis=0)
            for axis, place in zip(axes, places, strict=True):
                index[axis] = place
    return numbers[tuple(index)]


@dataclass
class Draws:
    """Gives the random numbers of one training step, in the order in which they are asked for.

    Attributes:
        seed: of all of them.
        drawn: those given since the step began.
    """

    seed: int
    drawn: list[Draw] = field(default_factory=list)

    def begin(self) -> None:
        """Begin a step: the next draw is the first."""
        self.drawn.clear()

    def uniform(self, shape: tuple[int, ...], where: str) -> np.ndarray:
        """Return numbers in [0, 1), float32 as float64, so that comparing them with a rate has the same outcome."""
        kept = _in_order(shape)
        numbers = np.random.default_rng([self.seed, len(self.drawn)]).random(kept, np.float32)
        self.drawn.append(Draw(where, kept))
        if len(kept) in ANY_ORDER:
            numbers = _symmetric(numbers).transpose(np.argsort(np.argsort(shape, kind="stable")))
        return numbers.astype(np.float64)

    def mask(self, shape: tuple[int, ...], rate: float, where: str) -> np.ndarray:
        """Return what to multiply with: 0, or 1/(1-rate)."""
        kept = self.uniform(shape, where) >= rate
        return kept / (1 - rate) if rate < 1 else np.zeros(shape)
