"""A twin's error against the float64 truth in units of rounding, and when two such errors are alike. No framework."""

import math

import numpy as np

from outlook_parity.core.check import Noise
from outlook_parity.core.precision import PRECISIONS

# Errors below one unit of rounding count as one: that a twin happens to round luckily is no difference.
LEAST_NOISE = 1.0

# In which order the n numbers of a parameter's gradient are added up is the libraries' choice. One after the other in
# the dtype itself, as XLA's CPU does for some shapes, the error is about sqrt(n / 24) units; in pairs it is next to
# none. The same holds for a loss, the mean of what it is of each number. So of a gradient or a loss that adds up n
# numbers, errors below this many times sqrt(n) count as that many.
SUM_NOISE = 0.25


def noise_of(array: np.ndarray, truth: np.ndarray, dtype: str) -> Noise:
    """Return the error of `array` in units of rounding: RMS by eps * RMS(truth), maximum by eps * max|truth|."""
    error, eps = np.asarray(np.abs(array - truth)), PRECISIONS[dtype].epsilon
    return Noise(rms=rms(error) / (eps * rms(truth)), max=float(error.max() / (eps * np.abs(truth).max())))


def rms(array: np.ndarray) -> float:
    """Return the root of the mean square."""
    largest = float(np.abs(array).max())  # divided out, so that no square overflows or vanishes
    return largest and largest * float(np.sqrt(np.mean(np.square(array / largest))))


def evenly(size: float) -> Noise:
    """Return a noise of this size in RMS and in the worst element."""
    return Noise(rms=size, max=size)


def sum_noise(terms: float, dtype: str) -> Noise:
    """Return the noise below which all counts as equally exact in a sum of so many numbers."""
    precision = PRECISIONS[dtype]
    return evenly(max(LEAST_NOISE, SUM_NOISE * math.sqrt(terms) * precision.sum_epsilon / precision.epsilon))


def noise_factor(one: Noise, other: Noise, *, least: Noise = evenly(LEAST_NOISE)) -> float:  # noqa: B008
    """Return how many times larger either noise is than the other, in RMS or in the worst element.

    A noise below `least` counts as `least`.
    """
    sizes = ((one.rms, other.rms, least.rms), (one.max, other.max, least.max))
    return max(max(a, b, floor) / max(min(a, b), floor) for a, b, floor in sizes)
