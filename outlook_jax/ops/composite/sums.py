"""Outlook attention as one local weighted sum per output phase (see `outlook_common.taps`); no window is ever moved.

The sum is bilinear in the probabilities and the values, and so are both its transposes: two primitives, `mix` and
`gram`, are each other's derivatives. Forward and reverse mode, of any order, and `vmap` all run on these two.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.interpreters import ad
from jaxtyping import Float

from outlook_common.dispatch import Implementation
from outlook_common.geometry import WindowGrid
from outlook_common.taps import AxisTaps, Phase, axis_taps
from outlook_jax.ops.composite import maps
from outlook_jax.ops.composite.gather import products_per_window, weighted_sum
from outlook_jax.ops.composite.map_last import map_last
from outlook_jax.ops.composite.merge import Merged, merged_in_a_loop
from outlook_jax.ops.composite.primitives import alike, apart, define
from outlook_jax.ops.composite.softmax import softmax
from outlook_jax.ops.promotion import at_least_float32

# With fewer numbers in the value, a training step saves a few milliseconds at most against the reference, and compiling
# it takes a second more.
SMALL = 2**12


def composite(
    value: Float[Array, "B H W N D"],
    logits: Float[Array, "B h w N KK KK"],
    dropout_mask: Float[Array, "B h w N KK KK"] | None,
    grid: WindowGrid,
    precision: lax.PrecisionLike = None,
) -> Float[Array, "B H W N D"]:
    """Return fold(softmax(logits) @ unfold(value)); operands as in `outlook_attention`, already checked.

    There is no matrix product, so `precision` changes nothing: products and sums are exact to their dtype.
    """
    return mix(weights(logits, dropout_mask, value.dtype), value, grid)


def weights(
    logits: Float[Array, "B h w N KK KK"], dropout_mask: Float[Array, "B h w N KK KK"] | None, dtype: Any
) -> Float[Array, "B N KK KK h w"]:
    """Return softmax and dropout of the logits, rounded to `dtype`, the value's."""
    # Softmax and sums run in float32 at least; the probabilities are rounded to value's dtype in between. With the map
    # last, both run along contiguous memory.
    probabilities = softmax(map_last(logits).astype(at_least_float32(logits)))
    if dropout_mask is not None:
        wide = at_least_float32(probabilities, dropout_mask)
        probabilities = probabilities.astype(wide) * map_last(dropout_mask).astype(wide)
    return probabilities.astype(dtype)


def mix(
    weights: Float[Array, "B N KK KK h w"], value: Float[Array, "B H W N D"], grid: WindowGrid
) -> Float[Array, "B H W N D"]:
    """Return, at each pixel x, the sum over d of the merged weights W[x, d] * value[x + d].

    It is computed in float32 at least and rounded once, to the dtype of both operands.
    """
    return _mix_p.bind(*alike(weights, value), grid=grid)


def gram(
    out: Float[Array, "B H W N D"], value: Float[Array, "B H W N D"], grid: WindowGrid
) -> Float[Array, "B N KK KK h w"]:
    """Return, for each pair of places p and q of each window, the product out[p] · value[q] over D; dtypes as `mix`."""
    return _gram_p.bind(*alike(out, value), grid=grid)


def _mix(weights: Array, value: Array, *, grid: WindowGrid) -> Array:
    return _weighted_sum(*_wide(weights, value), grid=grid).astype(value.dtype)


def _mix_on_cpu(weights: Array, value: Array, *, grid: WindowGrid) -> Array:
    operands = _wide(weights, value)
    run = partial(_weighted_sum, grid=grid, merge=merged_in_a_loop)
    return apart(run, operands[1], *operands).astype(value.dtype)


def _wide(*operands: Array) -> list[Array]:
    return [x.astype(at_least_float32(x)) for x in operands]


def _merged(weights: Float[Array, "B N KK KK h w"], rows: AxisTaps, columns: AxisTaps) -> Merged:
    return lambda r, t: _merged_of_phase(weights, rows, columns, rows.phases[r], columns.phases[t])


def _weighted_sum(
    weights: Array, value: Array, *, grid: WindowGrid, merge: Callable[[Array, AxisTaps, AxisTaps], Merged] = _merged
) -> Array:
    rows, columns = axis_taps(grid)
    padded = _padded(value, rows, columns)
    merged_of_phase = merge(weights, rows, columns)
    phases = {}
    for (r, row), (t, column) in product(enumerate(rows.phases), enumerate(columns.phases)):
        on_map = (-2, row.first_cell, row.pixels), (-1, column.first_cell, column.pixels)
        merged = _window(merged_of_phase(r, t), *on_map)
        total = jnp.zeros((len(value), row.pixels, column.pixels, *value.shape[3:]), value.dtype)
        for i, j in _displacements(row, column):
            weight = merged[:, :, i, j].transpose(0, 2, 3, 1)[..., None]
            total += weight * _displaced(padded, (rows, row, i), (columns, column, j))
        phases[row.first_pixel, column.first_pixel] = total
    return _interleaved(phases, rows, columns)


# One displacement of a phase, along one axis: the axis, the phase, and which of its displacements.
Tap = tuple[AxisTaps, Phase, int]


def _displacements(row: Phase, column: Phase) -> Iterator[tuple[int, int]]:
    if row.pixels and column.pixels:
        yield from product(range(row.displacements), range(column.displacements))


def _merged_of_phase(
    weights: Float[Array, "B N KK KK h w"], rows: AxisTaps, columns: AxisTaps, row: Phase, column: Phase
) -> Float[Array, "B N i j cells cells"]:
    """Return the sum of all weights at one displacement, for each displacement and cell of a phase."""
    B, N = weights.shape[:2]
    K, L = rows.kernel_size, columns.kernel_size
    blocks = weights.reshape(B, N, K, L, K, L, rows.windows, columns.windows)
    merged = jnp.zeros((B, N, row.displacements, column.displacements, rows.cells, columns.cells), weights.dtype)
    for (m, p), (n, s) in product(enumerate(row.places), enumerate(column.places)):
        i, j = row.index(p, 0), column.index(s, 0)
        merged = merged.at[:, :, i : i + K, j : j + L, m : m + rows.windows, n : n + columns.windows].add(
            blocks[:, :, p, s]
        )
    return merged


def _window(x: Array, *parts: tuple[int, int, int]) -> Array:
    """Return the part (axis, start, size) of `x`, zero where it reaches beyond."""
    config = [(0, 0, 0)] * x.ndim
    for axis, start, size in parts:
        config[axis] = (-start, start + size - x.shape[axis], 0)
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def _padded(value: Float[Array, "B H W N D"], rows: AxisTaps, columns: AxisTaps) -> Float[Array, "B _ _ N D"]:
    """Surround the map with as many zeros as the largest displacement."""
    above, left = rows.kernel_size - 1, columns.kernel_size - 1
    return jnp.pad(value, ((0, 0), (above, above), (left, left), (0, 0), (0, 0)))


def _displaced(padded: Float[Array, "B _ _ N D"], row_tap: Tap, column_tap: Tap) -> Float[Array, "B n m N D"]:
    """Return the pixels at one displacement from each pixel of a phase."""
    slices = []
    for axis, phase, index in (row_tap, column_tap):
        start = axis.kernel_size - 1 + phase.first_pixel + phase.first_displacement + index
        slices.append(slice(start, start + axis.stride * (phase.pixels - 1) + 1, axis.stride))
    return padded[:, slices[0], slices[1]]


def _interleaved(
    phases: dict[tuple[int, int], Float[Array, "B n m N D"]], rows: AxisTaps, columns: AxisTaps
) -> Float[Array, "B H W N D"]:
    """Return the map whose pixels S*k + f are those of the phase with first pixel f."""
    # Every phase has as many pixels as there are windows, or one less; a phase that is not on the map at all has none.
    n, m = rows.windows, columns.windows
    full = [
        [_window(phases[top, left], (1, 0, n), (2, 0, m)) for left in range(columns.stride)]
        for top in range(rows.stride)
    ]
    stacked = jnp.stack([jnp.stack(line, axis=3) for line in full], axis=2)
    B, *_, N, D = stacked.shape
    return stacked.reshape(B, n * rows.stride, m * columns.stride, N, D)[:, : rows.size, : columns.size]


def _gram(out: Array, value: Array, *, grid: WindowGrid) -> Array:
    return _per_window(_products(*_wide(out, value), grid=grid), grid, out).astype(value.dtype)


def _gram_on_cpu(out: Array, value: Array, *, grid: WindowGrid) -> Array:
    operands = _wide(out, value)
    run = partial(maps.products_per_window, grid=grid)
    return apart(run, _gram_shape(*map(jax.typeof, operands), grid=grid), *operands).astype(value.dtype)


# The products out[x] · value[x + d] of a phase, by the number of the phase along rows and columns.
Products = dict[tuple[int, int], Float[Array, "B N i j n m"]]


def _products(out: Array, value: Array, *, grid: WindowGrid) -> Products:
    rows, columns = axis_taps(grid)
    padded = _padded(value, rows, columns)
    products = {}
    for (r, row), (t, column) in product(enumerate(rows.phases), enumerate(columns.phases)):
        here = out[:, row.first_pixel :: rows.stride, column.first_pixel :: columns.stride]
        dots = [
            (here * _displaced(padded, (rows, row, i), (columns, column, j))).sum(axis=-1).transpose(0, 3, 1, 2)
            for i, j in _displacements(row, column)
        ]
        if dots:
            shape = (*dots[0].shape[:2], row.displacements, column.displacements, *dots[0].shape[2:])
            products[r, t] = jnp.stack(dots, axis=2).reshape(shape)
    return products


def _per_window(products: Products, grid: WindowGrid, out: Array) -> Float[Array, "B N KK KK h w"]:
    """Give each pair of places of a window the product at their displacement."""
    rows, columns = axis_taps(grid)
    B, N, K, L = out.shape[0], out.shape[3], rows.kernel_size, columns.kernel_size
    by_place = []
    for p, s in product(range(K), range(L)):
        (m, r), (n, t) = divmod(p, rows.stride), divmod(s, columns.stride)
        if (r, t) not in products:  # no pixel of this phase is on the map
            by_place.append(jnp.zeros((B, N, K, L, rows.windows, columns.windows), out.dtype))
            continue
        row, column = rows.phases[r], columns.phases[t]
        by_place.append(
            _window(
                products[r, t],
                (2, row.index(p, 0), K),
                (3, column.index(s, 0), L),
                (4, m - row.first_cell, rows.windows),
                (5, n - column.first_cell, columns.windows),
            )
        )
    return jnp.stack(by_place, axis=2).reshape(B, N, K * L, K * L, rows.windows, columns.windows)


def _transposed(weights: Float[Array, "B N KK KK h w"]) -> Float[Array, "B N KK KK h w"]:
    return weights.swapaxes(2, 3)


def _gram_shape(out: Any, value: Any, *, grid: WindowGrid) -> Any:
    B, _, _, N, _ = out.shape
    return out.update(shape=(B, N, grid.places, grid.places, *grid.grid))


_define_derivatives: Any = ad.defbilinear
_mix_p = define(
    "outlook_mix", _mix, lambda weights, value, *, grid: value, static="grid", cpu=_mix_on_cpu, gpu=weighted_sum
)
_gram_p = define("outlook_gram", _gram, _gram_shape, static="grid", cpu=_gram_on_cpu, gpu=products_per_window)
_define_derivatives(
    _mix_p,
    lambda cotangent, _, value, *, grid: gram(cotangent, value, grid),
    lambda cotangent, weights, _, *, grid: mix(_transposed(weights), cotangent, grid),
)
_define_derivatives(
    _gram_p,
    lambda cotangent, _, value, *, grid: mix(cotangent, value, grid),
    lambda cotangent, out, _, *, grid: mix(_transposed(cotangent), out, grid),
)


def _refusal(value: Array, *operands: Any) -> str | None:
    if not all(isinstance(size, int) for size in value.shape):
        return f"value has the symbolic shape {value.shape}; the reference takes a symbolic batch"
    return None


def _drawback(value: Array, *operands: Any) -> str | None:
    if value.size < SMALL:
        return (
            f"it compiles a second longer than the reference, which only hundreds of steps repay with "
            f"{value.size} < {SMALL} numbers in value: ask for it by name"
        )
    return None


COMPOSITE = Implementation(run=composite, refusal=_refusal, drawback=_drawback)
