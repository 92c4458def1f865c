"""Dropout masks that both twins share: the n-th draw of a training step is the same in either. Imports no framework."""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Draw:
    """One draw of random numbers, uniform in 0…1: where in the model, and of which shape."""

    where: str
    shape: tuple[int, ...]


# Which of the two places comes first in the weights of self-attention (batch, heads, place, place) is each twin's own
# affair. So masks of four axes are the same read either way: drawn with the shorter one first, and symmetric.
ATTENTION_AXES = 4


def _in_order(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], *sorted(shape[-2:])) if len(shape) == ATTENTION_AXES else tuple(shape)


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
        if len(kept) == ATTENTION_AXES and kept[-1] == kept[-2]:
            numbers = np.triu(numbers) + np.triu(numbers, 1).swapaxes(-1, -2)
        return (numbers if kept == shape else numbers.swapaxes(-1, -2)).astype(np.float64)

    def mask(self, shape: tuple[int, ...], rate: float, where: str) -> np.ndarray:
        """Return what to multiply with: 0, or 1/(1-rate)."""
        kept = self.uniform(shape, where) >= rate
        return kept / (1 - rate) if rate < 1 else np.zeros(shape)
