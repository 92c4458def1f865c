"""Composite's two sums as gathers and reductions, for GPUs.

XLA fuses these into one or two kernels each, without atomic additions. Which elements meet is decided in NumPy, per
axis; rows and columns do so independently of each other. A program so has the same few operations for any geometry.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from outlook_common.geometry import WindowGrid
from outlook_common.taps import AxisTaps, axis_taps
from outlook_jax.ops.promotion import at_least_float32

_Found = Bool[np.ndarray, "..."]
_Index = Int[np.ndarray, "..."]


class _Axis(NamedTuple):
    """The indices of one axis: T displacements, M windows at most over a pixel, Q pairs of pixels in one window.

    Attributes:
        weights: for each pixel, displacement and window over both pixels, (H, T, M): whether there is one, which
            window it is, the place of the pixel in it, and that of the displaced pixel.
        source: the displaced pixel, (H, T): whether it is on the map and in any window with the pixel, and which it is.
        pairs: the pixel and the displaced one of each pair, (Q,).
        pair: for each window and two of its places, (h, K, K): whether both are on the map, and which pair they are.
    """

    weights: tuple[_Found, _Index, _Index, _Index]
    source: tuple[_Found, _Index]
    pairs: tuple[_Index, _Index]
    pair: tuple[_Found, _Index]


def weighted_sum(
    weights: Float[Array, "B N KK KK h w"], value: Float[Array, "B H W N D"], grid: WindowGrid
) -> Float[Array, "B H W N D"]:
    """Return, at each pixel x, the sum over d of the merged weights W[x, d] * value[x + d]."""
    rows, columns = _axes(grid)
    B, H, W, N, D = value.shape
    (K, L), (h, w) = grid.kernel_size, grid.grid
    dtype = at_least_float32(value)

    found, window, place, other = map(_outer, rows.weights, columns.weights)
    merged = _take(
        _zero_after(weights.transpose(0, 4, 5, 1, 2, 3).reshape(B, h * w, N, K * L * K * L)),
        {1: _flat(window, (h, w), found), 3: _flat(place, (K, L)) * (K * L) + _flat(other, (K, L))},
        others=(0, 3),
    )  # B H W N T T M M
    merged = merged.astype(dtype).sum(axis=(6, 7)).transpose(0, 1, 2, 4, 5, 3)

    found, pixel = map(_outer, rows.source, columns.source)
    sources = _take(
        _zero_after(value.reshape(B, H * W, N, D)), {1: _flat(pixel, (H, W), found)}, others=(0, 5, 6)
    )  # B H W T T N D
    return (merged[..., None] * sources.astype(dtype)).sum(axis=(3, 4)).astype(value.dtype)


def products_per_window(
    out: Float[Array, "B H W N D"], value: Float[Array, "B H W N D"], grid: WindowGrid
) -> Float[Array, "B N KK KK h w"]:
    """Return, for each pair of places p and q of each window, the product out[p] · value[q] over D."""
    rows, columns = _axes(grid)
    B, H, W, N, D = value.shape
    (K, L), (h, w) = grid.kernel_size, grid.grid
    dtype = at_least_float32(value)

    here, there = (
        _take(x.reshape(B, H * W, N, D), {1: _flat(pixel, (H, W))}, others=(0, 3, 4)).astype(dtype)
        for x, pixel in zip((out, value), map(_outer, rows.pairs, columns.pairs), strict=True)
    )  # B Q Q N D
    products = (here * there).sum(axis=-1).astype(value.dtype)

    found, pair = map(_outer, rows.pair, columns.pair)
    Q, R = products.shape[1:3]
    per_window = _take(
        _zero_after(products.reshape(B, Q * R, N)), {1: _flat(pair, (Q, R), found)}, others=(0, 3)
    )  # B h w N K L K L
    return per_window.reshape(B, h, w, N, K * L, K * L).transpose(0, 3, 4, 5, 1, 2)


def _axes(grid: WindowGrid) -> tuple[_Axis, _Axis]:
    rows, columns = (_axis(axis, padding) for axis, padding in zip(axis_taps(grid), grid.padding, strict=True))
    return rows, columns


def _axis(axis: AxisTaps, padding: int) -> _Axis:
    K, S, h, size = axis.kernel_size, axis.stride, axis.windows, axis.size
    pixel, displacement, m = np.ogrid[:size, 1 - K : K, : -(-K // S)]
    cell, phase = np.divmod(pixel + padding, S)
    window, place, other, _ = np.broadcast_arrays(cell - m, phase + S * m, phase + S * m + displacement, displacement)
    found = (place < K) & (other >= 0) & (other < K) & (window >= 0) & (window < h)

    window, place, other = (np.where(found, x, 0) for x in (window, place, other))

    displaced = (pixel + displacement)[..., 0]
    meet = found.any(-1) & (displaced >= 0) & (displaced < size)
    first, number = np.nonzero(meet)

    # Which pair a pixel and a displacement make; what makes none is never looked up.
    pair_at = np.zeros(meet.shape, int)
    pair_at[meet] = np.arange(len(first))
    window_of, p, q = np.ogrid[:h, :K, :K]
    at, number_of = np.broadcast_arrays(S * window_of + p - padding, q - p + K - 1)
    on_map = (at >= 0) & (at < size)
    paired = on_map & meet[np.where(on_map, at, 0), number_of]
    return _Axis(
        weights=(found, window, place, other),
        source=(meet, np.where(meet, displaced, 0)),
        pairs=(first, displaced[first, number]),
        pair=(paired, np.where(paired, pair_at[np.where(on_map, at, 0), number_of], 0)),
    )


def _outer(row: np.ndarray, column: np.ndarray) -> tuple[Array, Array]:
    """Return both with as many axes each for rows and for columns, which take turns."""
    shapes = np.ones((2, row.ndim, 2), int)
    shapes[0, :, 0], shapes[1, :, 1] = row.shape, column.shape
    dtype = bool if row.dtype == bool else np.int32
    # As arrays of JAX, not of NumPy: what is computed of them is computed in the kernel and not read from memory.
    return jnp.asarray(row.reshape(shapes[0].ravel()), dtype), jnp.asarray(column.reshape(shapes[1].ravel()), dtype)


def _flat(index: tuple[Array, Array], sizes: tuple[int, int], found: tuple[Array, Array] | None = None) -> Array:
    """Return the index into both axes as one, that behind the last element where nothing is found."""
    flat = index[0] * sizes[1] + index[1]
    return flat if found is None else jnp.where(found[0] & found[1], flat, sizes[0] * sizes[1])


def _zero_after(x: Array) -> Array:
    """Add a zero at the end of the second axis."""
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, int(axis == 1), 0) for axis in range(x.ndim)])


def _take(x: Array, indices: dict[int, Array], *, others: tuple[int, ...]) -> Array:
    """Return x[indices], by axis; the other axes come to stand where `others` says."""
    axes = tuple(indices)
    numbers = lax.GatherDimensionNumbers(offset_dims=others, collapsed_slice_dims=axes, start_index_map=axes)
    sizes = tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))
    where = jnp.stack(jnp.broadcast_arrays(*indices.values()), axis=-1)
    return lax.gather(x, where, numbers, sizes, mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS)
