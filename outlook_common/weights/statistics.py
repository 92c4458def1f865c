"""Streaming statistics of a tensor: counts, minimum, maximum, mean, standard deviation."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from outlook_common.arrays import is_floating


class Statistics:
    """Statistics of numbers seen once, in blocks; extremes and moments are of finite numbers, in float64.

    Attributes:
        size: count of numbers.
        nan: count of NaN.
        inf: count of infinite numbers.
        zeros: count of zeros.
        smallest: minimum; None if no number is finite.
        largest: maximum; likewise.
    """

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.size = self.nan = self.inf = self.zeros = 0
        self.smallest: float | None = None
        self.largest: float | None = None
        self._dtype = dtype
        self._mean = self._squares = 0.0

    @property
    def finite(self) -> int:
        """Count of finite numbers."""
        return self.size - self.nan - self.inf

    @property
    def mean(self) -> float | None:
        """The mean; None if no number is finite."""
        return self._mean if self.finite and math.isfinite(self._mean) else None

    @property
    def deviation(self) -> float | None:
        """The standard deviation; None if no number is finite."""
        return math.sqrt(self._squares / self.finite) if self.finite and math.isfinite(self._squares) else None

    def watch(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield blocks of bytes unchanged, adding them to the statistics."""
        for block in blocks:
            self._add(block.view(self._dtype))
            yield block

    def _add(self, numbers: np.ndarray) -> None:
        before = self.finite
        self.size += numbers.size
        self.zeros += numbers.size - int(np.count_nonzero(numbers))
        if is_floating(numbers):
            with np.errstate(invalid="ignore"):  # testing a signalling NaN of bfloat16 sets the flag
                finite, nan = np.isfinite(numbers), int(np.count_nonzero(np.isnan(numbers)))
            self.nan += nan
            self.inf += numbers.size - int(np.count_nonzero(finite)) - nan
            numbers = numbers[finite]
        if numbers.size == 0:
            return
        in_float64 = numbers.astype(np.float64)
        low, high = float(in_float64.min()), float(in_float64.max())
        self.smallest = low if self.smallest is None else min(self.smallest, low)
        self.largest = high if self.largest is None else max(self.largest, high)
        # Chan's parallel algorithm: no difference of large sums.
        with np.errstate(over="ignore", invalid="ignore"):
            mean = float(in_float64.mean())
            squares = float(np.square(in_float64 - mean).sum())
        share, gap = numbers.size / (before + numbers.size), mean - self._mean
        self._squares += squares + gap * gap * before * share
        self._mean += gap * share

    def to_dict(self) -> dict[str, Any]:
        """Return the statistics as a dict for JSON."""
        names = ("size", "nan", "inf", "zeros", "smallest", "largest", "mean", "deviation")
        return {name: getattr(self, name) for name in names}
