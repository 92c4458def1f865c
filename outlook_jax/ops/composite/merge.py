"""Composite's weights merged by displacement, in one loop, for CPUs."""

from collections.abc import Callable
from itertools import product

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from outlook_common.taps import AxisTaps
from outlook_jax.ops.composite.maps import dynamic_slice, dynamic_update_slice
from outlook_jax.ops.composite.primitives import alike

# Weights merged by displacement, (B, N, i, j, cells, cells), of the phase with these numbers along rows and columns.
Merged = Callable[[int, int], Array]


def merged_in_a_loop(weights: Float[Array, "B N KK KK h w"], rows: AxisTaps, columns: AxisTaps) -> Merged:
    """Return the sums of all weights at one displacement, by phase; a program has one addition for all places."""
    B, N = weights.shape[:2]
    K, L, h, w = rows.kernel_size, columns.kernel_size, rows.windows, columns.windows
    blocks = weights.reshape(B, N, K, L, K, L, h, w)
    first_row, first_column = (
        np.cumsum([0, *(phase.displacements for phase in axis.phases)]) for axis in (rows, columns)
    )
    # The displacements of all phases, one behind the other.
    none = jnp.zeros((B, N, first_row[-1], first_column[-1], rows.cells, columns.cells), weights.dtype)

    def add(merged: Array, numbers: Array) -> tuple[Array, None]:
        p, i, m, s, j, n = numbers
        block = dynamic_slice(blocks, (0, 0, p, s, 0, 0, 0, 0), (B, N, 1, 1, K, L, h, w)).reshape(B, N, K, L, h, w)
        at = 0, 0, i, j, m, n
        return dynamic_update_slice(merged, dynamic_slice(merged, at, block.shape) + block, at), None

    places = product(_places(rows, first_row), _places(columns, first_column))
    merged, _ = lax.scan(add, alike(none, weights)[0], jnp.array([(*row, *column) for row, column in places]))
    return lambda r, t: merged[:, :, first_row[r] : first_row[r + 1], first_column[t] : first_column[t + 1]]


def _places(axis: AxisTaps, first: np.ndarray) -> list[tuple[int, int, int]]:
    """Return, for each place p of a window, p, its first displacement, and the cell of the window's first place."""
    found = []
    for p in range(axis.kernel_size):
        m, r = divmod(p, axis.stride)
        found.append((p, int(first[r]) + axis.phases[r].index(p, 0), m))
    return found
