"""Noise: a twin's error against the float64 truth in units of rounding. Imports no framework."""

import math

import numpy as np

from outlook_parity.core.check import Noise
from outlook_parity.core.precision import PRECISIONS

# Numbers whose squares are in memory at once.
PIECE = 1 << 20

# Errors below one unit of rounding count as one: rounding luckily is no difference.
LEAST_NOISE = 1.0

# In which order the n numbers of a parameter's gradient are added up is the libraries' choice. One after the other in
# the dtype itself, as XLA's CPU does for some shapes, the error is about sqrt(n / 24) units; in pairs it is next to
# none. The same holds for a loss, the mean of what it is of each number. So of a gradient or a loss that adds up n
# numbers, errors below this many times sqrt(n) count as that many.
SUM_NOISE = 0.25


def noise_of(array: np.ndarray, truth: np.ndarray, dtype: str, *, out: np.ndarray | None = None) -> Noise:
    """Return the error of `array` in units of rounding: RMS by eps * RMS(truth), maximum by eps * max|truth|.

    `out` is overwritten, and may be `array`: both may be as large as memory allows.
    """
    error, eps = distance(array, truth, out), PRECISIONS[dtype].epsilon
    return Noise(rms=rms(error) / (eps * rms(truth)), max=float(error.max() / (eps * largest(truth))))


def distance(one: np.ndarray, other: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Return |one - other|, in `out` if it is given."""
    difference = np.asarray(np.subtract(one, other, out=out))
    return np.abs(difference, out=difference)  # in place: the arrays may be as large as memory allows


def largest(array: np.ndarray) -> float:
    """Return max|array|."""
    return float(max(array.max(), -array.min()))


def rms(array: np.ndarray) -> float:
    """Return the root of the mean square."""
    scale = largest(array)  # divided out, so that no square overflows or vanishes
    if not scale:
        return 0.0
    numbers = np.asarray(array).reshape(-1)
    squares = (np.square(numbers[start : start + PIECE] / scale).sum() for start in range(0, numbers.size, PIECE))
    return scale * math.sqrt(math.fsum(squares) / numbers.size)


def rounding_units(torch: np.ndarray, jax: np.ndarray, dtype: str) -> np.ndarray:
    """Return |jax - torch| per entry, in units of rounding: eps of `dtype` times the RMS of torch's."""
    return np.abs(jax - torch) / (PRECISIONS[dtype].epsilon * rms(torch))


def uniform_noise(size: float) -> Noise:
    """Return a noise with this RMS and maximum."""
    return Noise(rms=size, max=size)


def sum_noise(terms: float, dtype: str) -> Noise:
    """Return the noise below which sums of `terms` numbers count as equally exact."""
    precision = PRECISIONS[dtype]
    return uniform_noise(max(LEAST_NOISE, SUM_NOISE * math.sqrt(terms) * precision.sum_epsilon / precision.epsilon))


def noise_factor(one: Noise, other: Noise, *, least: Noise = uniform_noise(LEAST_NOISE)) -> float:  # noqa: B008
    """Return the larger factor between two noises, in RMS or in maximum.

    A noise below `least` counts as `least`.
    """
    sizes = ((one.rms, other.rms, least.rms), (one.max, other.max, least.max))
    return max(max(a, b, floor) / max(min(a, b), floor) for a, b, floor in sizes)
