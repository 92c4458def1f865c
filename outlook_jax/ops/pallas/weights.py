"""Softmax and merged weights, all of them rows of cells."""

from collections import defaultdict
from functools import reduce
from operator import add
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from outlook_jax.ops.pallas.cells import SUBLANES, Cells
from outlook_jax.ops.pallas.moves import Ref, read, rows_loop, write


def softmax_rows(logits: Ref, row: Array, places: int) -> list[Array]:
    """Return eight rows of probabilities by input place q, (8, lanes) each, from row (head, p) = `row` on.

    `logits` is (lanes / 128, (N, p, q), 128).
    """
    slabs = group(logits, row, places)
    top = reduce(jnp.maximum, slabs)
    exponentials = [jnp.exp(x - top) for x in slabs]
    inverse = 1 / reduce(add, exponentials)
    return [x * inverse for x in exponentials]


def group(features: Ref, row: Array, places: int) -> list[Array]:
    """Return eight rows (head, p) of `features`, (lanes / 128, (N, p, q), 128), for each q."""
    return [read(features, pl.ds(row * places + q, SUBLANES, stride=places)) for q in range(places)]


def probabilities(
    logits: Ref, mask: Ref | None, inside: Array, cells: Cells, heads: int, dtype: DTypeLike, *, weights: Ref
) -> None:
    """Write the weights, (q, lanes / 128, (N, p), 128): rounded to `dtype`, zero where there is no window."""
    places = cells.grid.places

    def eight_rows(g: Array) -> None:
        row = pl.multiple_of(g * SUBLANES, SUBLANES)
        found = softmax_rows(logits, row, places)
        if mask is not None:
            found = [x * m for x, m in zip(found, group(mask, row, places), strict=True)]
        for q, x in enumerate(found):
            write(weights.at[q], pl.ds(row, SUBLANES), x.astype(dtype).astype(x.dtype) * inside)

    rows_loop(-(-heads * places // SUBLANES), eight_rows)


def merge(weights: Ref, cells: Cells, heads: int, *, swapped: bool, merged: Ref) -> None:
    """Sum the weights that meet, (taps, lanes / 128, N, 128), each row of cells where its input's row is.

    The roll by rows of cells is left to `mix`, which does it once for all taps of a row. `swapped` reads p for q.
    """
    places = cells.places
    for number, pairs in enumerate(cells.taps().values()):
        by_distance: dict[int, list[Array]] = defaultdict(list)
        for p, q in pairs:
            here, there = (q, p) if swapped else (p, q)
            slab = read(weights.at[there], pl.ds(here, heads, stride=len(places)))
            by_distance[cells.distance(places[q].offset[0], places[p].offset[1])].append(slab)
        total = reduce(add, (roll(reduce(add, slabs), distance) for distance, slabs in by_distance.items()))
        write(merged.at[number], pl.ds(0, heads), total)


def roll(x: Array, distance: int) -> Array:
    """Move cells up by `distance` lanes, those at the end to the start."""
    # A distance of 64 bits, which a Python int is under `jax_enable_x64`, is none for Mosaic.
    shift: Any = np.int32(distance)
    return pltpu.roll(x, shift, axis=x.ndim - 1) if distance else x
