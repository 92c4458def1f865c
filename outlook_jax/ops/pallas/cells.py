"""Window grid, pixels and windows in one grid of cells, as the kernels keep them in lanes.

A cell is S*S pixels and one window: pixel y = S*k + s is phase s of cell k, and place p of window i is the pixel
S*i + p - P, phase (p - P) mod S of cell i + floor((p - P) / S). So with A the weights of a window,

    out_s[k] = sum over p of phase s, and over q, of A[k - o(p), p, q] * value_t[k - o(p) + o(q)],  t = phase of q

and all weights that meet at one (s, t, o(q) - o(p)) are summed before they meet a channel. Cells of a map lie on one
axis, row by row with `pitch` cells from row to row, so that a displacement is one roll of that axis.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import jax.numpy as jnp

from outlook_common.geometry import WindowGrid

LANES = 128
SUBLANES = 8

Pair = tuple[int, int]


class Tap(NamedTuple):
    """Weights that meet: from which phases to which, over how many cells."""

    phase: Pair
    source: Pair
    displacement: Pair


@dataclass(frozen=True)
class Place:
    """A place of a window: which phase of which cell, counted from the window's own."""

    phase: Pair
    offset: Pair


@dataclass(frozen=True)
class Cells:
    """How blocks of rows of the map lie in lanes.

    Attributes:
        grid: the window grid.
        rows: rows of cells that one block computes.
        blocks: how many blocks a map has.
        halo: rows of cells that a block reads above, and as many below; one block alone needs none above, as the
            rows below also stand for those above when a roll wraps.
        pitch: cells from row to row; those beyond the map are zero, and no displacement is longer.
    """

    grid: WindowGrid
    rows: int
    blocks: int
    halo: int
    pitch: int

    @property
    def lanes(self) -> int:
        """How many lanes a block takes, whole tiles."""
        return round_up(self.loaded * self.pitch if self.blocks > 1 else (self.rows + self.reach) * self.pitch, LANES)

    @property
    def reach(self) -> int:
        """The longest way, in rows of cells, from a window or pixel to one that it reads."""
        return _reach(self.grid, 0)

    @property
    def loaded(self) -> int:
        """Rows of cells that one block loads."""
        return self.rows + 2 * self.halo

    @property
    def places(self) -> list[Place]:
        """By place, row by row."""
        (K, L), (S, T), (P, Q) = self.grid.kernel_size, self.grid.stride, self.grid.padding
        return [Place(((p - P) % S, (q - Q) % T), ((p - P) // S, (q - Q) // T)) for p, q in product(range(K), range(L))]

    @property
    def phases(self) -> list[Pair]:
        """Row by row."""
        return list(product(range(self.grid.stride[0]), range(self.grid.stride[1])))

    def taps(self) -> dict[Tap, list[Pair]]:
        """Return the pairs of places (p, q) whose weights meet."""
        found: dict[Tap, list[Pair]] = {}
        for (p, here), (q, there) in product(enumerate(self.places), repeat=2):
            displacement = (there.offset[0] - here.offset[0], there.offset[1] - here.offset[1])
            found.setdefault(Tap(here.phase, there.phase, displacement), []).append((p, q))
        return dict(sorted(found.items()))

    def distance(self, rows: int, columns: int) -> int:
        """Return how many lanes a displacement is, as a roll that is never negative."""
        return (rows * self.pitch + columns) % self.lanes


def lay_out(grid: WindowGrid, rows: int) -> Cells:
    """Return blocks of at most `rows` rows of cells."""
    height, width = grid.grid
    blocks = -(-height // rows)
    pitch = round_up(width + _reach(grid, 1), SUBLANES)
    return Cells(grid, -(-height // blocks), blocks, _reach(grid, 0) if blocks > 1 else 0, pitch)


def _reach(grid: WindowGrid, axis: int) -> int:
    """Return the longest way, in cells, from a window or pixel to one that it reads."""
    K, S, P = (sizes[axis] for sizes in (grid.kernel_size, grid.stride, grid.padding))
    first, last = -P // S, (K - 1 - P) // S
    return max(abs(first), abs(last), last - first)


def round_up(n: int, unit: int) -> int:
    """Return the least multiple of `unit` that is not below `n`."""
    return -(-n // unit) * unit


def first_loaded(wanted: Any, size: int, count: int) -> Any:
    """Return the first of the `count` rows that a block loads, of `size`: those wanted, as far as they exist.

    Mosaic loads nothing from before an array.
    """
    return jnp.clip(wanted, 0, size - count)
