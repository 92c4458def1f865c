"""The kernels for whole tiles of images: 128 of them lie over lanes, channels over sublanes.

Where a batch fills the lanes, XLA lays it there itself, for then nothing is padded; and a displacement is an index, so
that nothing is rolled. Pixels off the map are read where the map ends, with weights of zero.
"""

from collections.abc import Callable
from functools import reduce
from itertools import product
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from outlook_jax.ops.pallas.cells import SUBLANES, Cells, Pair, first_loaded
from outlook_jax.ops.pallas.moves import Ref, part, read, rows_loop, spread, write
from outlook_jax.ops.pallas.weights import group, softmax_rows


class Blocks(NamedTuple):
    """What a program computes, and what it reads.

    Attributes:
        cells: windows and pixels; of its layout in lanes nothing counts here.
        rows: rows of windows, or of cells, that one block computes.
        windows_above: rows of windows that it reads above them.
        windows: rows of windows that it reads.
        pixels_above: rows of pixels that it reads above them.
        pixels: rows of pixels that it reads.
        margin: columns of zeros beside the windows.
        heads: N.
        chunk: how many channels are computed at once.
        number: which block this is.
    """

    cells: Cells
    rows: int
    windows_above: int
    windows: int
    pixels_above: int
    pixels: int
    margin: int
    heads: int
    chunk: int
    number: Any = None

    def pixel(self, row: Array, column: Array) -> tuple[Array, Array, Array]:
        """Return where a pixel of the map is in the block, as (row, column), and whether it is on the map: 1 or 0."""
        H, W = self.cells.grid.map_size
        inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
        first = self.number * (self.rows * self.cells.grid.stride[0]) - self.pixels_above
        first = first_loaded(first, H, self.pixels)
        at = jnp.clip(jnp.clip(row, 0, H - 1) - first, 0, self.pixels - 1)
        return at, jnp.clip(column, 0, W - 1), jnp.where(inside, 1.0, 0.0)

    def window_row(self, row: Array) -> Array:
        """Return where the weights of a row of windows are; before and behind those loaded are rows of zeros."""
        h = self.cells.grid.grid[0]
        first = first_loaded(self.number * self.rows - self.windows_above, h, self.windows)
        return jnp.clip(row - first, -1, self.windows) + 1


MIX_SCRATCH = ("slab", "mask", "weights", "merged")


def mix_kernel(*refs: Ref, blocks: Blocks, masked: bool, swapped: bool) -> None:
    """Outlook attention or its transpose; `refs` are those of value, logits, perhaps the mask, out, and scratch."""
    value, logits, *masks, out = refs[: 3 + masked]
    scratch = dict(zip(MIX_SCRATCH, refs[3 + masked :], strict=True))
    blocks = blocks._replace(number=pl.program_id(1))  # within a loop the interpreter does not know it
    weights = scratch["weights"]
    w = blocks.cells.grid.grid[1]
    columns = w + 2 * blocks.margin
    for i in (0, blocks.windows + 1):
        rows_loop(columns, lambda j, i=i: _clear(weights.at[i, j]))
    for j in (*range(blocks.margin), *range(w + blocks.margin, columns)):
        rows_loop(blocks.windows, lambda i, j=j: _clear(weights.at[i + 1, j]))

    def one_window(i: Array, j: Array) -> None:
        _to_slab(logits, i, j, scratch["slab"])
        if masked:
            _to_slab(masks[0], i, j, scratch["mask"])
        mask = scratch["mask"] if masked else None
        _probabilities(scratch["slab"], mask, blocks, value.dtype, weights.at[i + 1, j + blocks.margin])

    def one_cell(k: Array, x: Array) -> None:
        _merge(weights, blocks, k, x, swapped=swapped, merged=scratch["merged"])
        _weighted_sum(value, scratch["merged"], blocks, k, x, out=out)

    _two_loops(blocks.windows, w, one_window)
    _two_loops(blocks.rows, w, one_cell)


def _two_loops(rows: int, columns: int, body: Callable[[Array, Array], None]) -> None:
    rows_loop(rows, lambda i: rows_loop(columns, lambda j: body(i, j)))


def _clear(ref: Ref) -> None:
    ref[...] = jnp.zeros_like(ref)


def _to_slab(windows: Ref, i: Array, j: Array, slab: Ref) -> None:
    # Rows that are apart are read from arrays of 32 bits alone.
    x = windows[i, j]
    slab[0, : x.shape[0], :] = x.astype(slab.dtype)


def _row_groups(blocks: Blocks) -> int:
    return -(-blocks.heads * blocks.cells.grid.places // SUBLANES)


def _probabilities(slab: Ref, mask: Ref | None, blocks: Blocks, dtype: DTypeLike, weights: Ref) -> None:
    """Write the weights of one window, ((N, p, q), 128)."""
    places = blocks.cells.grid.places

    def eight_rows(g: Array) -> None:
        row = pl.multiple_of(g * SUBLANES, SUBLANES)
        found = softmax_rows(slab, row, places)
        if mask is not None:
            found = [x * m for x, m in zip(found, group(mask, row, places), strict=True)]
        for q, x in enumerate(found):
            rounded = x.astype(dtype).astype(x.dtype)
            write(weights, pl.ds(row * places + q, SUBLANES, stride=places), rounded)

    rows_loop(_row_groups(blocks), eight_rows)


def _merge(weights: Ref, blocks: Blocks, k: Array, x: Array, *, swapped: bool, merged: Ref) -> None:
    """Sum the weights that meet in one cell, (taps, N, 128); zero where their pixel is off the map."""
    places, count = blocks.cells.places, blocks.cells.grid.places
    for number, (tap, pairs) in enumerate(blocks.cells.taps().items()):
        terms = []
        for p, q in pairs:
            up, left = places[p].offset
            here, there = (q, p) if swapped else (p, q)
            row = blocks.window_row(blocks.number * blocks.rows + k - up)
            window = weights.at[row, x + (blocks.margin - left)]
            terms.append(read(window, pl.ds(here * count + there, blocks.heads, stride=count * count)))
        inside = blocks.pixel(*_pixel_of(blocks, k, x, tap.displacement, tap.source))[2]
        merged[number, 0, : blocks.heads, :] = reduce(jnp.add, terms) * inside.astype(merged.dtype)


def _pixel_of(blocks: Blocks, k: Array, x: Array, offset: Pair, phase: Pair) -> tuple[Array, Array]:
    """Return the pixel of the map that is `phase` of the cell `offset` cells from cell (k, x) of the block."""
    S, T = blocks.cells.grid.stride
    row = S * (blocks.number * blocks.rows + k + offset[0]) + phase[0]
    return row, T * (x + offset[1]) + phase[1]


def _weighted_sum(value: Ref, merged: Ref, blocks: Blocks, k: Array, x: Array, *, out: Ref) -> None:
    """Write the pixels of one cell."""
    (S, T), W = blocks.cells.grid.stride, blocks.cells.grid.map_size[1]
    taps = list(blocks.cells.taps())
    sources = list(dict.fromkeys((tap.displacement, tap.source) for tap in taps))
    channels, wide = value.shape[2], merged.dtype
    depth = channels // blocks.heads // blocks.chunk

    def some_channels(i: Array) -> None:
        rows, head = pl.ds(pl.multiple_of(i * blocks.chunk, blocks.chunk), blocks.chunk), part(i, depth)
        sums: dict[Pair, Any] = {phase: jnp.zeros((blocks.chunk, 128), wide) for phase in blocks.cells.phases}
        for source in sources:
            at_row, at_column, _ = blocks.pixel(*_pixel_of(blocks, k, x, *source))
            pixel = value[at_row, at_column, rows, :].astype(wide)
            for number, tap in enumerate(taps):
                if (tap.displacement, tap.source) == source:
                    weight = jnp.tile(spread(merged.at[number], head), (blocks.chunk // SUBLANES, 1))
                    sums[tap.phase] += weight * pixel
        for (s, t), total in sums.items():

            def store(s: int = s, t: int = t, total: Array = total) -> None:
                out[k * S + s, x * T + t, rows, :] = total.astype(out.dtype)

            if W % T:  # the last cell reaches past the map
                pl.when(x * T + t < W)(store)
            else:
                store()

    rows_loop(channels // blocks.chunk, some_channels)


GRAM_SCRATCH = ("slab", "mask", "products", "sums")


def gram_kernel(*refs: Ref, blocks: Blocks, masked: bool) -> None:
    """The gradient of the logits; `refs` are those of cotangent, value, logits, perhaps the mask, out, and scratch."""
    cotangent, value, logits, *masks, out = refs[: 4 + masked]
    scratch = dict(zip(GRAM_SCRATCH, refs[4 + masked :], strict=True))
    blocks = blocks._replace(number=pl.program_id(1))

    def one_window(i: Array, j: Array) -> None:
        _products(cotangent, value, blocks, i, j, sums=scratch["sums"])
        _add_up(scratch["sums"], blocks, i, j, out=scratch["products"])
        _to_slab(logits, i, j, scratch["slab"])
        if masked:
            _to_slab(masks[0], i, j, scratch["mask"])
        _softmax_backward(scratch["products"], scratch["mask"] if masked else None, blocks, logits=scratch["slab"])
        out[i, j] = scratch["slab"][0, : out.shape[2], :].astype(out.dtype)

    _two_loops(blocks.rows, blocks.cells.grid.grid[1], one_window)


def _products(cotangent: Ref, value: Ref, blocks: Blocks, i: Array, j: Array, *, sums: Ref) -> None:
    """Write the products of each pair of places, ((p, q), 8 N, 128), eight partial sums over the channels of a head."""
    places = blocks.cells.places
    channels, wide = value.shape[2], sums.dtype
    depth = channels // blocks.heads // blocks.chunk
    pixels = [blocks.pixel(*_pixel_of(blocks, i, j, place.offset, place.phase))[:2] for place in places]
    if depth > 1:
        _clear(sums)

    def some_channels(n: Array) -> None:
        rows = pl.ds(pl.multiple_of(n * blocks.chunk, blocks.chunk), blocks.chunk)
        into = pl.ds(pl.multiple_of(part(n, depth) * SUBLANES, SUBLANES), SUBLANES)
        theirs = [value[row, column, rows, :].astype(wide) for row, column in pixels]
        for p, (row, column) in enumerate(pixels):
            ours = cotangent[row, column, rows, :].astype(wide)
            for q, pixel in enumerate(theirs):
                terms = ours * pixel
                total = reduce(jnp.add, (terms[at : at + SUBLANES] for at in range(0, blocks.chunk, SUBLANES)))
                number = p * len(places) + q
                sums[number, into, :] = total if depth == 1 else sums[number, into, :] + total

    rows_loop(channels // blocks.chunk, some_channels)


def _add_up(sums: Ref, blocks: Blocks, i: Array, j: Array, *, out: Ref) -> None:
    """Write the products of one window, ((N, p, q), 128), zero where a pixel is off the map."""
    places = blocks.cells.places
    inside = [blocks.pixel(*_pixel_of(blocks, i, j, place.offset, place.phase))[2] for place in places]
    for p, q in product(range(len(places)), repeat=2):
        number = p * len(places) + q
        parts = (sums.at[number][pl.ds(n, blocks.heads, stride=SUBLANES), :] for n in range(SUBLANES))
        total = reduce(jnp.add, parts) * (inside[p] * inside[q]).astype(out.dtype)
        write(out, pl.ds(number, blocks.heads, stride=len(places) ** 2), total)


def _softmax_backward(products: Ref, mask: Ref | None, blocks: Blocks, *, logits: Ref) -> None:
    """Write the gradient over the logits of one window."""
    places = blocks.cells.grid.places

    def eight_rows(g: Array) -> None:
        row = pl.multiple_of(g * SUBLANES, SUBLANES)
        weights = softmax_rows(logits, row, places)
        gradients = group(products, row, places)
        if mask is not None:
            gradients = [x * m for x, m in zip(gradients, group(mask, row, places), strict=True)]
        inner = reduce(jnp.add, (w * x for w, x in zip(weights, gradients, strict=True)))
        for q, (w, x) in enumerate(zip(weights, gradients, strict=True)):
            write(logits, pl.ds(row * places + q, SUBLANES, stride=places), w * (x - inner))

    rows_loop(_row_groups(blocks), eight_rows)
