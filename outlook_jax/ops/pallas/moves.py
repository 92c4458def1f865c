"""Between blocks of HBM, pixels over sublanes, and VMEM, cells over lanes.

A map comes channels last, its columns over sublanes. Here each channel becomes a row of cells: then weights of one
head are spread over its channels by reading one row again and again, which costs nothing, and sums over channels are
sums of rows.
"""

from itertools import product
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from outlook_jax.ops.pallas.cells import LANES, SUBLANES, Cells, first_loaded, round_up

Ref = Any  # of a block in VMEM; Pallas has no public type for it


def rows_loop(count: int, body: Any) -> None:
    """Run body(k) for k below `count`, as a loop of the kernel."""
    lax.fori_loop(jnp.int32(0), jnp.int32(count), lambda k, _: body(k), None)


def part(i: Array, size: int) -> Array:
    """Return which part of `size` the number `i`, not negative, is in."""
    # `//` asks for the sign of `i`, which Mosaic lowers differently from TPU to TPU, and so asks which one this is.
    return lax.div(i, jnp.int32(size))


def load_map(block: Ref, stage: Ref, line: Ref, cells: Cells, *, transposed: Ref) -> None:
    """Lay the pixels of a block, (rows, W, C), into `transposed`, (phases, C, lanes), by phase; zero off the map."""
    (S, T), (H, W) = cells.grid.stride, cells.grid.map_size
    C, w = block.shape[-1], cells.grid.grid[1]
    first = _first_row(cells)
    start = first_loaded(S * first, H, block.shape[0])
    stage[...] = jnp.zeros_like(stage)
    if T > 1:
        line[...] = jnp.zeros_like(line)

    def one_row(k: Array) -> None:
        at = pl.multiple_of(k * cells.pitch, SUBLANES)
        for s in range(S):
            y = S * (first + k) + s
            at_row = jnp.clip(y - start, 0, block.shape[0] - 1)
            pixels = jnp.where((y >= 0) & (y < H), block[at_row].astype(stage.dtype), 0)
            if T == 1:
                stage[s, pl.ds(at, W), :C] = pixels
                continue
            for tile, channels in enumerate(_tiles(C)):
                line[tile, :W, : len(channels)] = pixels[:, channels.start : channels.stop]
            for t in range(T):
                stage[s * T + t, pl.ds(at, w), :] = read(line, pl.ds(t, w, stride=T))

    rows_loop(cells.loaded, one_row)
    _transpose(stage, transposed)


def load_windows(block: Ref, stage: Ref, cells: Cells, *, transposed: Ref) -> None:
    """Lay the windows of a block, (rows, w, F), into `transposed`, (lanes / 128, F, 128)."""
    w, F = block.shape[-2:]
    # No window that is not there may hold an infinity: its weights are dropped by a product with zero.
    stage[...] = jnp.zeros_like(stage)
    first, h = _first_row(cells), cells.grid.grid[0]
    start = first_loaded(first, h, block.shape[0])

    def one_row(k: Array) -> None:
        at = pl.multiple_of(k * cells.pitch, SUBLANES)
        inside = (first + k >= 0) & (first + k < h)
        at_row = jnp.clip(first + k - start, 0, block.shape[0] - 1)
        stage[pl.ds(at, w), :F] = jnp.where(inside, block[at_row].astype(stage.dtype), 0)

    rows_loop(cells.loaded, one_row)
    for tile, at in product(range(transposed.shape[0]), range(0, stage.shape[1], LANES)):
        transposed[tile, pl.ds(at, LANES), :] = stage[pl.ds(tile * LANES, LANES), pl.ds(at, LANES)].T


def store_map(transposed: Ref, stage: Ref, line: Ref, cells: Cells, *, block: Ref) -> None:
    """Write what `load_map` would lay into `transposed` to a block of the output, without its halo."""
    (S, T), W = cells.grid.stride, cells.grid.map_size[1]
    C, w = block.shape[-1], cells.grid.grid[1]
    _transpose(transposed, stage)

    def one_row(k: Array) -> None:
        at = pl.multiple_of((k + cells.halo) * cells.pitch, SUBLANES)
        for s in range(S):
            if T == 1:
                block[k * S + s] = stage[s, pl.ds(at, W), :C].astype(block.dtype)
                continue
            for t in range(T):
                write(line, pl.ds(t, w, stride=T), stage[s * T + t, pl.ds(at, w), :])
            block[k * S + s] = read(line, pl.ds(0, W))[:, :C].astype(block.dtype)

    rows_loop(cells.rows, one_row)


def store_windows(transposed: Ref, stage: Ref, cells: Cells, *, block: Ref) -> None:
    """Write rows of features to a block of the output, (rows, w, F), without its halo."""
    w, F = block.shape[-2:]
    for tile, at in product(range(transposed.shape[0]), range(0, stage.shape[1], LANES)):
        stage[pl.ds(tile * LANES, LANES), pl.ds(at, LANES)] = transposed[tile, pl.ds(at, LANES), :].T

    def one_row(k: Array) -> None:
        at = pl.multiple_of((k + cells.halo) * cells.pitch, SUBLANES)
        block[k] = stage[pl.ds(at, w), :F].astype(block.dtype)

    rows_loop(cells.rows, one_row)


def window_lanes(cells: Cells, like: Ref) -> Array:
    """Return 1 in the lanes of windows, (1, lanes), else 0."""
    first, (h, w) = _first_row(cells), cells.grid.grid
    lane = lax.broadcasted_iota(jnp.int32, (1, cells.lanes), 1)
    inside = jnp.zeros((1, cells.lanes), like.dtype)
    for k in range(cells.loaded):  # no vector is divided by `pitch`: that is many instructions
        here = (lane >= k * cells.pitch) & (lane < k * cells.pitch + w)
        exists = jnp.where((first + k >= 0) & (first + k < h), 1, 0).astype(like.dtype)
        inside = jnp.where(here, exists, inside)
    return inside


def _first_row(cells: Cells) -> Array:
    return pl.program_id(1) * cells.rows - cells.halo


def _transpose(source: Ref, target: Ref) -> None:
    """Swap the last two axes; both are whole tiles."""
    for phase in range(source.shape[0]):
        for at in range(0, source.shape[2], LANES):
            target[phase, pl.ds(at, LANES), :] = source[phase, :, pl.ds(at, LANES)].T


def read(tiles: Ref, rows: Any) -> Array:
    """Return rows of an array kept as (tiles, rows, 128). Mosaic reads rows that are apart from such ones alone."""
    return jnp.concatenate([tiles.at[i][rows, :] for i in range(tiles.shape[0])], axis=1)


def spread(tiles: Ref, row: Array) -> Array:
    """Return one row of an array kept as (tiles, rows, 128), eight times."""
    # Tile by tile, for then the load itself spreads it; a row of several tiles takes two permutations for each.
    rows = [tiles.at[i][pl.ds(row, 1), :] for i in range(tiles.shape[0])]
    return jnp.concatenate([jnp.broadcast_to(x, (SUBLANES, LANES)) for x in rows], axis=1)


def write(tiles: Ref, rows: Any, x: Array) -> None:
    """Write rows of an array kept as (tiles, rows, 128)."""
    for i in range(tiles.shape[0]):
        tiles.at[i][rows, :] = x[:, i * LANES : (i + 1) * LANES]


def _tiles(columns: int) -> list[range]:
    return [range(at, min(columns, at + LANES)) for at in range(0, columns, LANES)]


def padded_rows(n: int) -> int:
    """Return how many sublanes a transposed array of `n` columns takes."""
    return round_up(n, LANES)
