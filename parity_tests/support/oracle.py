"""Outlook attention written once more, window by window in NumPy float64: neither framework's code, nor ours."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from outlook_common import WindowGrid

Array = np.ndarray


class Operands(NamedTuple):
    value: Array
    logits: Array
    cotangent: Array
    dropout_mask: Array | None = None


def with_leading(operands: Operands, leading: tuple[int, ...]) -> Operands:
    """Return the operands with these axes in place of the batch's one."""
    arrays = (None if array is None else array.reshape(*leading, *array.shape[1:]) for array in operands)
    return Operands(*arrays)


class Results(NamedTuple):
    """The output and the gradients of sum(out * cotangent)."""

    out: Array
    d_value: Array
    d_logits: Array


def attend(operands: Operands, grid: WindowGrid) -> Results:
    """Return output and gradients in float64."""
    value, logits, cotangent, mask = _float64(operands)
    probabilities = _softmax(logits)
    dropped = probabilities if mask is None else probabilities * mask
    out, d_value, d_dropped = mix(value, dropped, cotangent, grid)
    d_probabilities = d_dropped if mask is None else d_dropped * mask
    inner = (d_probabilities * probabilities).sum(axis=-1, keepdims=True)
    return Results(out, d_value, probabilities * (d_probabilities - inner))


def magnitudes(operands: Operands, grid: WindowGrid) -> Results:
    """Return, per entry of each result, the sum of the absolute values of the terms that it adds up.

    A rounding error of relative size u in every term changes a result by at most u times its magnitude.
    """
    value, logits, cotangent, mask = _float64(operands)
    probabilities = _softmax(logits)
    dropped = probabilities if mask is None else probabilities * mask
    out, d_value, d_dropped = mix(np.abs(value), dropped, np.abs(cotangent), grid)
    d_probabilities = d_dropped if mask is None else d_dropped * mask
    inner = (d_probabilities * probabilities).sum(axis=-1, keepdims=True)
    return Results(out, d_value, probabilities * (d_probabilities + inner))


def _float64(operands: Operands) -> list[Array | None]:
    return [None if array is None else array.astype(np.float64) for array in operands]


def _softmax(logits: Array) -> Array:
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def mix(value: Array, weights: Array, cotangent: Array, grid: WindowGrid) -> tuple[Array, Array, Array]:
    B, _, _, N, D = value.shape
    K = grid.places
    padded_value, padded_cotangent = _pad(value, grid), _pad(cotangent, grid)
    out, d_value, d_weights = np.zeros_like(padded_value), np.zeros_like(padded_value), np.zeros_like(weights)
    for (i, j), (rows, columns) in _windows(grid):
        shape = (B, *grid.kernel_size, N, D)
        v = padded_value[:, rows, columns].reshape(B, K, N, D)
        dy = padded_cotangent[:, rows, columns].reshape(B, K, N, D)
        a = weights[:, i, j]
        out[:, rows, columns] += np.einsum("bnpq,bqnd->bpnd", a, v).reshape(shape)
        d_value[:, rows, columns] += np.einsum("bnpq,bpnd->bqnd", a, dy).reshape(shape)
        d_weights[:, i, j] = np.einsum("bpnd,bqnd->bnpq", dy, v)
    return _crop(out, grid), _crop(d_value, grid), d_weights


def _windows(grid: WindowGrid) -> Iterator[tuple[tuple[int, int], tuple[slice, slice]]]:
    for i, j in np.ndindex(*grid.grid):
        top, left = i * grid.stride[0], j * grid.stride[1]
        yield (i, j), (slice(top, top + grid.kernel_size[0]), slice(left, left + grid.kernel_size[1]))


def _pad(x: Array, grid: WindowGrid) -> Array:
    rows, columns = grid.padding
    return np.pad(x, ((0, 0), (rows, rows), (columns, columns), (0, 0), (0, 0)))


def _crop(x: Array, grid: WindowGrid) -> Array:
    (top, left), (H, W) = grid.padding, grid.map_size
    return x[:, top : top + H, left : left + W]
