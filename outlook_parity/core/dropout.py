"""Dropout masks shared by both twins: the n-th draw of a training step is the same in both. Imports no framework."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import numpy as np


@dataclass(frozen=True)
class Draw:
    """One draw of uniform random numbers: the module that drew, and the shape."""

    where: str
    shape: tuple[int, ...]
    given: tuple[int, ...] = ()  # as it was asked for; `shape` is the same in any order of a map's axes


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


LARGEST = float(np.nextafter(np.float32(1), np.float32(0)))  # of the numbers in [0, 1)

# Where a function of JAX draws that no module has dropout for.
FUNCTIONAL = "jax.random.bernoulli"


def cannot_be_shared(torch: Sequence[Draw], jax: Sequence[Draw]) -> str:
    """Return why the masks of a training step cannot be the same in both twins, "" if they can, or if that is a fault.

    Flax's attention draws one mask for all samples and heads, by a function: there its shape has ones where PyTorch's
    has sizes. Any other difference of draws is for the comparison to find.
    """
    if len(torch) != len(jax):
        return ""
    reason = ""
    for one, other in zip(torch, jax, strict=True):
        if one.shape == other.shape:
            continue
        if not correspond(one, other):
            return ""
        reason = reason or (
            f"attention in {one.where or 'torch'} draws a dropout mask of shape {one.given} in torch, in JAX one of "
            f"shape {other.given} for all samples and heads"
        )
    return reason


def correspond(torch: Draw, jax: Draw) -> bool:
    """Whether two draws can be the same one: of one shape, or one mask for all samples and heads in JAX's function."""
    return torch.shape == jax.shape or (jax.where == FUNCTIONAL and _for_all(jax.given, torch.given))


def has_single_numbers_alone(torch: Sequence[Draw], jax: Sequence[Draw]) -> bool:
    """Whether torch draws single numbers (for LayerDrop, of any rate) that JAX does not, and all else corresponds."""
    others = without_single_numbers(torch)
    return len(others) == len(jax) < len(torch) and all(map(correspond, others, jax))


def without_single_numbers(draws: Sequence[Draw]) -> list[Draw]:
    """Return the draws of masks: all but those of single numbers."""
    return [draw for draw in draws if draw.shape]


def _for_all(shape: tuple[int, ...], full: tuple[int, ...]) -> bool:
    """Whether one mask serves all samples and heads, the leading axes, and is whole along those of the positions."""
    leading = next((axis for axis, size in enumerate(shape) if size != 1), len(shape))
    positions = shape[leading:]
    return leading > 0 and bool(positions) and len(full) > len(positions) and full[-len(positions) :] == positions


@dataclass
class Draws:
    """The random numbers of one training step, in the order of the calls.

    Attributes:
        seed: of all of them.
        drawn: the draws since the step began.
        keep_all: whether nothing is dropped: all numbers are as large as they can be.
        single: what single numbers are, which then count as no draws; None where they are drawn as all others.
    """

    seed: int
    drawn: list[Draw] = field(default_factory=list)
    keep_all: bool = False
    single: float | None = None

    def begin(self) -> None:
        """Begin a step: the next draw is the first."""
        self.drawn.clear()

    def uniform(self, shape: tuple[int, ...], where: str) -> np.ndarray:
        """Return numbers in [0, 1), float32 as float64, so that twins compare them with a rate alike."""
        if not shape and self.single is not None:
            return np.asarray(self.single)
        kept = _in_order(shape)
        numbers = np.random.default_rng([self.seed, len(self.drawn)]).random(kept, np.float32)
        if self.keep_all:
            numbers = np.full(kept, LARGEST)
        self.drawn.append(Draw(where, kept, tuple(shape)))
        if len(kept) in ANY_ORDER:
            numbers = _symmetric(numbers).transpose(np.argsort(np.argsort(shape, kind="stable")))
        return numbers.astype(np.float64)

    def mask(self, shape: tuple[int, ...], rate: float, where: str) -> np.ndarray:
        """Return a dropout mask of 0 and 1/(1-rate)."""
        kept = self.uniform(shape, where) >= rate
        return kept / (1 - rate) if rate < 1 else np.zeros(shape)


@contextmanager
def python_random(draws: Draws, where: Callable[[], str]) -> Iterator[None]:
    """Let `draws` decide what Python's `random` returns, which ports of LayerDrop ask in place of PyTorch's."""

    def number() -> float:
        return float(draws.uniform((), where()))

    def uniform(a: float, b: float) -> float:
        return a + (b - a) * number()

    with patch.multiple(random, random=number, uniform=uniform):
        yield
