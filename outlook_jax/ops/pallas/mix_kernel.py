"""The kernel of outlook attention, and of its transpose: softmax, merged weights, weighted sum, fold."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from outlook_jax.ops.pallas.cells import SUBLANES, Cells, Pair
from outlook_jax.ops.pallas.moves import Ref, load_map, load_windows, part, rows_loop, spread, store_map, window_lanes
from outlook_jax.ops.pallas.weights import merge, probabilities, roll


def mix_kernel(*refs: Ref, cells: Cells, heads: int, masked: bool, swapped: bool) -> None:
    """Compute one block of rows; `refs` are those of value, logits, the mask if there is one, out, and scratch."""
    value, logits, *masks, out = refs[: 3 + masked]
    scratch = dict(zip(MIX_SCRATCH, refs[3 + masked :], strict=True))
    load_windows(logits, scratch["window_stage"], cells, transposed=scratch["logits"])
    if masked:
        load_windows(masks[0], scratch["window_stage"], cells, transposed=scratch["mask"])
    mask = scratch["mask"] if masked else None
    inside = window_lanes(cells, scratch["logits"])
    probabilities(scratch["logits"], mask, inside, cells, heads, value.dtype, weights=scratch["weights"])
    merge(scratch["weights"], cells, heads, swapped=swapped, merged=scratch["merged"])
    load_map(value, scratch["stage"], scratch["line"], cells, transposed=scratch["value"])
    _weighted_sum(scratch["value"], scratch["merged"], cells, value.shape[-1], heads, out=scratch["value"])
    store_map(scratch["value"], scratch["stage"], scratch["line"], cells, block=out)


MIX_SCRATCH = ("window_stage", "logits", "mask", "weights", "merged", "stage", "line", "value")


def _weighted_sum(value: Ref, merged: Ref, cells: Cells, channels: int, heads: int, *, out: Ref) -> None:
    """Write the sum of weights times displaced values, (phases, C, lanes); `out` may be `value`."""
    taps = list(cells.taps())
    numbers = {phase: number for number, phase in enumerate(cells.phases)}
    depth = channels // heads // SUBLANES  # of one head, in whole tiles

    def eight_channels(i: Array) -> None:
        rows, head = pl.ds(pl.multiple_of(i * SUBLANES, SUBLANES), SUBLANES), part(i, depth)
        # By output phase and rows to the input; columns are already where they belong.
        sums: dict[tuple[Pair, int], Array] = {}
        for source in cells.phases:
            here = value[numbers[source], rows, :]
            for columns in sorted({tap.displacement[1] for tap in taps if tap.source == source}):
                moved = roll(here, cells.distance(0, -columns))
                for number, tap in enumerate(taps):
                    if tap.source == source and tap.displacement[1] == columns:
                        term = spread(merged.at[number], head) * moved
                        key = tap.phase, tap.displacement[0]
                        sums[key] = sums[key] + term if key in sums else term
        for phase, number in numbers.items():
            total: Any = jnp.zeros((SUBLANES, cells.lanes), value.dtype)
            for (other, down), found in sums.items():
                if other == phase:
                    total += roll(found, cells.distance(-down, 0))
            out[number, rows, :] = total

    rows_loop(channels // SUBLANES, eight_channels)
