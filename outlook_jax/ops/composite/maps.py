"""Composite's products per window as elementwise sums of whole maps, for CPUs.

XLA's CPU compiler vectorises no sum over an axis, but it does vectorise elementwise sums of products. It takes some
30 ms for each of its loops, so all displacements and all windows' places go through one.
"""

from collections.abc import Sequence
from functools import partial, reduce
from itertools import chain, product
from math import prod
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from outlook_common.geometry import WindowGrid
from outlook_common.taps import AxisTaps, axis_taps
from outlook_jax.ops.composite.primitives import alike

# How many channels one round of the loop adds up: more take longer to compile, fewer pass over memory more often.
UNROLLED = 16

# No index here is negative. Where one may be, each is computed by a loop of its own, which takes 10 ms to compile.
dynamic_slice = partial(lax.dynamic_slice, allow_negative_indices=False)
dynamic_update_slice = partial(lax.dynamic_update_slice, allow_negative_indices=False)


def products_per_window(
    out: Float[Array, "B H W N D"], value: Float[Array, "B H W N D"], grid: WindowGrid
) -> Float[Array, "B N KK KK h w"]:
    """Return, for each pair of places p and q of each window, the product out[p] · value[q] over D."""
    maps = _as_maps(out, value, grid)
    if not (maps.rows and maps.columns):  # no pixel is in any window
        B, _, _, N, _ = out.shape
        return jnp.zeros((B, N, grid.places, grid.places, *grid.grid), out.dtype)
    return _per_window(_summed(maps), maps, grid)


class _Tap(NamedTuple):
    """One displacement of a phase along one axis: its pixels times those of `source`, `offset` lines or pixels on.

    Both are the remainders of pixels from the stride; `pixels` is how many of the phase are on the map.
    """

    phase: int
    source: int
    offset: int
    pixels: int


class _Maps(NamedTuple):
    """Both operands by the remainders of rows and columns from the stride, of which a phase is one.

    The map is last and flat, in lines of `pitch` pixels, so that a displacement is an offset.
    """

    out: Float[Array, "S T B N D nm"]
    value: Float[Array, "S T B N D _"]
    rows: list[_Tap]
    columns: list[_Tap]
    pitch: int


def _as_maps(out: Array, value: Array, grid: WindowGrid) -> _Maps:
    rows, columns = axis_taps(grid)
    # Around the map as many zeros as the largest displacement, in whole strides.
    margins = [axis.stride * -(-(axis.kernel_size - 1) // axis.stride) for axis in (rows, columns)]
    lines, pitch = (
        -(-(axis.size + axis.kernel_size - 1 + margin) // axis.stride)
        for axis, margin in zip((rows, columns), margins, strict=True)
    )

    def by_remainder(x: Array, margins: Sequence[int], lines: int) -> Float[Array, "S T B N D nm"]:
        B, H, W, N, D = x.shape
        x = x.reshape(B, H * W, N * D).swapaxes(1, 2).reshape(B, N, D, H, W)
        sizes = (lines, rows.stride), (pitch, columns.stride)
        # An operation of JAX's, as `jnp.pad` takes no negative padding.
        ends = [(margin, prod(size) - n - margin, 0) for margin, size, n in zip(margins, sizes, (H, W), strict=True)]
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0)] * 3 + ends)
        x = x.reshape(B, N, D, *chain(*sizes)).transpose(4, 6, 0, 1, 2, 3, 5)
        return x.reshape(*x.shape[:5], lines * pitch)

    return _Maps(
        out=by_remainder(out, (0, 0), max(row.pixels for row in rows.phases)),
        # Two lines more, which meet no pixel: a phase may have one line less than `out`, and a column reaches into the
        # next line.
        value=by_remainder(value, margins, lines + 2),
        rows=_taps(rows, margins[0]),
        columns=_taps(columns, margins[1]),
        pitch=pitch,
    )


def _taps(axis: AxisTaps, margin: int) -> list[_Tap]:
    found = []
    for phase in axis.phases:
        for i in range(phase.displacements if phase.pixels else 0):
            offset, source = divmod(phase.first_pixel + phase.first_displacement + i + margin, axis.stride)
            found.append(_Tap(phase.first_pixel, source, offset, phase.pixels))
    return found


def _summed(maps: _Maps) -> Float[Array, "U V B N nm"]:
    """Return, for each tap of the rows and of the columns, the sums over D of its products.

    Taps are a loop, so that a program has the products of one alone.
    """
    _, _, B, N, D, L = maps.out.shape
    size = max(c for c in range(1, min(D, UNROLLED) + 1) if D % c == 0)
    taps = [
        (i, row.phase, column.phase, row.source, column.source, row.offset * maps.pitch + column.offset)
        for i, (row, column) in enumerate(product(maps.rows, maps.columns))
    ]
    rounds = jnp.array([(start, *tap) for start in range(D // size) for tap in taps])
    out, value = (x.reshape(*x.shape[:4], D // size, size, x.shape[-1]) for x in (maps.out, maps.value))

    def add(sums: Array, numbers: Array) -> tuple[Array, None]:
        start, i, *phase, row, column, at = numbers
        # Each channel by a slice of its own, which is read where it lies; one slice of all would be copied.
        products = (
            lax.mul(
                dynamic_slice(out, (*phase, 0, 0, start, k, 0), (1, 1, B, N, 1, 1, L)),
                dynamic_slice(value, (row, column, 0, 0, start, k, at), (1, 1, B, N, 1, 1, L)),
            )
            for k in range(size)
        )
        at_tap = (i, 0, 0, 0)
        total = reduce(lax.add, (x.reshape(1, B, N, L) for x in products), dynamic_slice(sums, at_tap, (1, B, N, L)))
        return dynamic_update_slice(sums, total, at_tap), None

    none = jnp.zeros((len(taps), B, N, L), maps.out.dtype)
    sums, _ = lax.scan(add, alike(none, maps.out)[0], rounds)
    return sums.reshape(len(maps.rows), len(maps.columns), B, N, L)


class _Window(NamedTuple):
    """One place of the windows along one axis: its first tap, how far its pixels are, whether they are on the map."""

    tap: int
    shift: int
    on_map: bool


def _per_window(sums: Float[Array, "U V B N nm"], maps: _Maps, grid: WindowGrid) -> Float[Array, "B N KK KK h w"]:
    """Give each pair of places of a window the product at their displacement."""
    rows, columns = axis_taps(grid)
    (K, L), (h, w), pitch = grid.kernel_size, grid.grid, maps.pitch
    places = [
        (row.tap, column.tap, row.shift * pitch + column.shift, row.on_map and column.on_map)
        for row, column in product(_windows(rows), _windows(columns))
    ]
    size = h * pitch
    before = max(0, *(-shift for _, _, shift, _ in places))
    after = max(0, *(shift + size - sums.shape[-1] for _, _, shift, _ in places))
    # A window may reach beyond the map, where a product is zero whatever it is of.
    x = jnp.where(_on_map(maps, sums.shape[-1]), sums, 0)
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0)] * 4 + [(before, after, 0)])

    def window(place: Array) -> Float[Array, "K L B N hm"]:
        u, v, shift, on_map = place
        part = dynamic_slice(x, (u, v, 0, 0, shift + before), (K, L, *x.shape[2:4], size))
        return jnp.where(on_map, part, 0)

    out = lax.map(window, np.array(places))
    B, N = x.shape[2:4]
    # Few axes, for a transpose of six compiles for five times as long; batch and heads apart, for devices share either.
    out = out.reshape((K * L) ** 2, B, N, h, pitch)[..., :w].reshape((K * L) ** 2, B, N, h * w).transpose(1, 2, 0, 3)
    return out.reshape(B, N, K * L, K * L, h, w)


def _windows(axis: AxisTaps) -> list[_Window]:
    """Return, for each place p, what `_Window` says; a tap of place p is its first, to place 0."""
    first = np.cumsum([0, *(phase.displacements if phase.pixels else 0 for phase in axis.phases)])
    found = []
    for p in range(axis.kernel_size):
        m, r = divmod(p, axis.stride)
        phase = axis.phases[r]
        tap = int(first[r]) + phase.index(p, 0) if phase.pixels else 0
        found.append(_Window(tap, m - phase.first_cell if phase.pixels else 0, phase.pixels > 0))
    return found


def _on_map(maps: _Maps, size: int) -> np.ndarray:
    """Return whether there is a pixel of the map, by tap of rows and of columns, (U, V, 1, 1, nm)."""
    line, column = np.divmod(np.arange(size), maps.pitch)
    rows, columns = (np.array([tap.pixels for tap in taps]) for taps in (maps.rows, maps.columns))
    found: np.ndarray = (line < rows[:, None, None]) & (column < columns[:, None])
    return found[:, :, None, None]
