"""Counts and moments of a tensor that passes by in blocks."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from outlook_common.arrays import is_floating


class Statistics:
    """What is known of numbers that were seen once; moments and extremes are of the finite ones, in float64.

    Attributes:
        size: how many numbers.
        nan: how many are NaN.
        inf: how many are infinite.
        zeros: how many are zero.
        smallest: None if none is finite.
        largest: likewise.
    """

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.size = self.nan = self.inf = self.zeros = 0
        self.smallest: float | None = None
        self.largest: float | None = None
        self._dtype = dtype
        self._mean = self._squares = 0.0

    @property
    def finite(self) -> int:
        """How many numbers are finite."""
        return self.size - self.nan - self.inf

    @property
    def mean(self) -> float | None:
        """None if no number is finite."""
        return self._mean if self.finite and math.isfinite(self._mean) else None

    @property
    def deviation(self) -> float | None:
        """The standard deviation; None if no number is finite."""
        return math.sqrt(self._squares / self.finite) if self.finite and math.isfinite(self._squares) else None

    def watch(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield blocks of bytes, counting what is in them."""
        for block in blocks:
            self._see(block.view(self._dtype))
            yield block

    def _see(self, numbers: np.ndarray) -> None:
        before = self.finite
        self.size += numbers.size
        self.zeros += numbers.size - int(np.count_nonzero(numbers))
        if is_floating(numbers):
            with np.errstate(invalid="ignore"):  # looking at a signalling NaN of bfloat16 sets it off
                finite, nan = np.isfinite(numbers), int(np.count_nonzero(np.isnan(numbers)))
            self.nan += nan
            self.inf += numbers.size - int(np.count_nonzero(finite)) - nan
            numbers = numbers[finite]
        if numbers.size == 0:
            return
        wide = numbers.astype(np.float64)
        low, high = float(wide.min()), float(wide.max())
        self.smallest = low if self.smallest is None else min(self.smallest, low)
        self.largest = high if self.largest is None else max(self.largest, high)
        # Chan's way of adding moments: no difference of large sums.
        with np.errstate(over="ignore", invalid="ignore"):
            mean = float(wide.mean())
            squares = float(np.square(wide - mean).sum())
        share, gap = numbers.size / (before + numbers.size), mean - self._mean
        self._squares += squares + gap * gap * before * share
        self._mean += gap * share

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        names = ("size", "nan", "inf", "zeros", "smallest", "largest", "mean", "deviation")
        return {name: getattr(self, name) for name in names}
