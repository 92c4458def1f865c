"""Orders of axes: which order in JAX fits an array of PyTorch. No framework."""

import numpy as np

Axes = tuple[int, ...]


def channels_last(ndim: int) -> Axes:
    """Return the axes that move the channels, the second axis, to the end."""
    return (0, *range(2, ndim), 1)


def fitting_axes(torch: tuple[int, ...], jax: tuple[int, ...]) -> list[Axes]:
    """Return the orders of PyTorch's axes that give JAX's shape.

    Candidates are the same order, channels last, and of three axes the first two exchanged (batch and steps).
    """
    ndim = len(torch)
    candidates = [tuple(range(ndim))]
    if ndim > 2:
        candidates.append(channels_last(ndim))
    if ndim == 3:
        candidates.append((1, 0, 2))
    return [axes for axes in candidates if tuple(torch[axis] for axis in axes) == jax]


def nearest_axes(torch: np.ndarray, jax: np.ndarray, fitting: list[Axes]) -> Axes:
    """Return which of several orders that fit by shape gives the smallest mean difference."""
    distances = [_distance(torch.transpose(axes), jax) for axes in fitting]
    return fitting[int(np.argmin(distances))]


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    """Return the mean absolute difference of the finite entries."""
    with np.errstate(invalid="ignore"):  # Inf - Inf
        difference = np.abs(one.astype(np.float64) - other.astype(np.float64))
    finite = difference[np.isfinite(difference)]
    return float(finite.mean()) if finite.size else 0.0
