"""The kernel of the gradient of the logits: products of windows over channels, then softmax backward."""

from functools import reduce
from operator import add

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from outlook_jax.ops.pallas.cells import SUBLANES, Cells
from outlook_jax.ops.pallas.moves import Ref, load_map, load_windows, part, read, rows_loop, store_windows, write
from outlook_jax.ops.pallas.weights import group, roll, softmax_rows


def gram_kernel(*refs: Ref, cells: Cells, heads: int, masked: bool) -> None:
    """Compute one block of rows; `refs` are those of cotangent, value, logits, perhaps the mask, out, and scratch."""
    cotangent, value, logits, *masks, out = refs[: 4 + masked]
    scratch = dict(zip(GRAM_SCRATCH, refs[4 + masked :], strict=True))
    load_map(cotangent, scratch["stage"], scratch["line"], cells, transposed=scratch["cotangent"])
    load_map(value, scratch["stage"], scratch["line"], cells, transposed=scratch["value"])
    _products(scratch["cotangent"], scratch["value"], cells, value.shape[-1], heads, out=scratch["products"])
    _per_window(scratch["products"], cells, heads, out=scratch["weights"])
    load_windows(logits, scratch["window_stage"], cells, transposed=scratch["logits"])
    if masked:
        load_windows(masks[0], scratch["window_stage"], cells, transposed=scratch["mask"])
    mask = scratch["mask"] if masked else None
    _softmax_backward(scratch["weights"], mask, cells, heads, logits=scratch["logits"])
    store_windows(scratch["logits"], scratch["window_stage"], cells, block=out)


GRAM_SCRATCH = ("window_stage", "logits", "mask", "weights", "products", "stage", "line", "cotangent", "value")


def _products(cotangent: Ref, value: Ref, cells: Cells, channels: int, heads: int, *, out: Ref) -> None:
    """Write the products of each tap, (taps, lanes / 128, 8 N, 128), eight partial sums over the channels of a head.

    They stand in the row of cells of the value and in the column of the cotangent: each is rolled one way alone.
    """
    taps = list(cells.taps())
    numbers = {phase: number for number, phase in enumerate(cells.phases)}
    depth = channels // heads // SUBLANES
    tiles = next(n for n in (4, 2, 1) if depth % n == 0)
    if depth > tiles:
        out[...] = jnp.zeros_like(out)

    def some_channels(i: Array) -> None:
        rows = pl.ds(pl.multiple_of(i * tiles * SUBLANES, SUBLANES), tiles * SUBLANES)
        sums = pl.ds(pl.multiple_of(part(i, depth // tiles) * SUBLANES, SUBLANES), SUBLANES)
        ours = {
            key: roll(cotangent[numbers[key[0]], rows, :], cells.distance(key[1], 0))
            for key in sorted({(tap.phase, tap.displacement[0]) for tap in taps})
        }
        theirs = {
            key: roll(value[numbers[key[0]], rows, :], cells.distance(0, -key[1]))
            for key in sorted({(tap.source, tap.displacement[1]) for tap in taps})
        }
        for number, tap in enumerate(taps):
            terms = ours[tap.phase, tap.displacement[0]] * theirs[tap.source, tap.displacement[1]]
            total = reduce(add, (terms[n * SUBLANES : (n + 1) * SUBLANES] for n in range(tiles)))
            write(out.at[number], sums, total if depth == tiles else read(out.at[number], sums) + total)

    rows_loop(channels // (tiles * SUBLANES), some_channels)


def _per_window(products: Ref, cells: Cells, heads: int, *, out: Ref) -> None:
    """Give each pair of places the product at their displacement, (q, lanes / 128, (N, p), 128)."""
    places = cells.places
    for number, pairs in enumerate(cells.taps().values()):
        parts = (read(products.at[number], pl.ds(n, heads, stride=SUBLANES)) for n in range(SUBLANES))
        total = reduce(add, parts)
        for p, q in pairs:
            moved = roll(total, cells.distance(-places[q].offset[0], -places[p].offset[1]))
            write(out.at[q], pl.ds(p, heads, stride=len(places)), moved)


def _softmax_backward(products: Ref, mask: Ref | None, cells: Cells, heads: int, *, logits: Ref) -> None:
    """Write the gradient over the logits."""
    places = cells.grid.places

    def eight_rows(g: Array) -> None:
        row = pl.multiple_of(g * SUBLANES, SUBLANES)
        weights = softmax_rows(logits, row, places)
        gradients = [read(products.at[q], pl.ds(row, SUBLANES)) for q in range(places)]
        if mask is not None:
            gradients = [x * m for x, m in zip(gradients, group(mask, row, places), strict=True)]
        inner = reduce(add, (w * x for w, x in zip(weights, gradients, strict=True)))
        for q, (w, x) in enumerate(zip(weights, gradients, strict=True)):
            write(logits, pl.ds(row * places + q, SUBLANES, stride=places), w * (x - inner))

    rows_loop(-(-heads * places // SUBLANES), eight_rows)
