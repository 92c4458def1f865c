"""Bicubic resizing as one matrix per axis, shared by the twins."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

# a of the cubic convolution in PyTorch and the original; JAX and others use -0.5, as Keys proposed.
CUBIC = -0.75

# The pixels that one is computed from, counted from the one at or before its centre.
TAPS = (-1, 0, 1, 2)


@lru_cache(maxsize=64)
def bicubic_matrix(size: int, new_size: int) -> np.ndarray:
    """Return the (new_size, size) float64 matrix that resizes one axis as `F.interpolate(mode="bicubic")` does.

    Half-pixel centres, no antialiasing, edges clamped. The array is read-only.

    Raises:
        ValueError: a size is below 1.
    """
    if size < 1 or new_size < 1:
        raise ValueError(f"sizes must be at least 1, got {size} and {new_size}")
    centre = (np.arange(new_size) + 0.5) * (size / new_size) - 0.5
    first = np.floor(centre).astype(int)
    matrix = np.zeros((new_size, size))
    for tap in TAPS:
        weight = cubic(np.abs(centre - (first + tap)), np.where)
        np.add.at(matrix, (np.arange(new_size), np.clip(first + tap, 0, size - 1)), weight)
    matrix.flags.writeable = False
    return matrix


def resize_map(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize maps (B, H, W, C) to `size` in float64; return them in their own dtype."""
    if x.shape[1:3] == tuple(size):
        return x
    rows, columns = (bicubic_matrix(old, new) for old, new in zip(x.shape[1:3], size, strict=True))
    return np.einsum("hH,wW,bHWc->bhwc", rows, columns, x.astype(np.float64), optimize=True).astype(x.dtype)


def cubic(distance: Any, where: Callable[..., Any]) -> Any:
    """Return the cubic convolution kernel (Keys 1981, equation 4) at distances from 0 to 2.

    Args:
        distance: an array of any framework.
        where: the framework's function of that name.
    """
    a, d = CUBIC, distance
    near = ((a + 2) * d - (a + 3)) * d**2 + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return where(d <= 1, near, far)
