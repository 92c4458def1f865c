"""Outlook attention as a list of samples: which merged weight multiplies which pixel, for every pixel and head.

See `outlook_common.taps` for the merged weights. Those of one image lie in one row of slots: phase after phase, each
of shape (N, row displacements, column displacements, row cells, column cells).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from outlook_common.geometry import WindowGrid
from outlook_common.taps import AxisTaps, Phase, axis_taps


@dataclass(frozen=True)
class Block:
    """Where the merged weights of one phase lie: `shape` from slot `start` on."""

    row: Phase
    column: Phase
    start: int
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        """The slot behind the last."""
        return self.start + prod(self.shape)


@dataclass(frozen=True)
class Samples:
    """The samples of one image of H·W·N rows (a row is a pixel's D channels of one head), ordered by their target.

    Attributes:
        slots: of each sample, the slot of its merged weight.
        sources: the row that it multiplies.
        targets: the row that it is added to.
        offsets: at which sample each target row begins, and behind the last one's.
        sample_of_slot: the inverse of `slots`; the number of samples where no sample has the slot.
    """

    slots: Int[Tensor, " samples"]
    sources: Int[Tensor, " samples"]
    targets: Int[Tensor, " samples"]
    offsets: Int[Tensor, " offsets"]
    sample_of_slot: Int[Tensor, " slots"]


@lru_cache(maxsize=64)
def blocks(grid: WindowGrid, heads: int) -> tuple[Block, ...]:
    """Return where the merged weights of each phase lie."""
    rows, columns = axis_taps(grid)
    found: list[Block] = []
    start = 0
    for row, column in product(rows.phases, columns.phases):
        shape = (heads, row.displacements, column.displacements, rows.cells, columns.cells)
        found.append(Block(row, column, start, shape))
        start = found[-1].stop
    return tuple(found)


def most_samples(grid: WindowGrid, heads: int) -> int:
    """Return how many samples an image has, with those whose source is off the map, which are left out."""
    return heads * prod(sum(phase.pixels * phase.displacements for phase in axis.phases) for axis in axis_taps(grid))


@lru_cache(maxsize=64)
def samples(grid: WindowGrid, heads: int, device: torch.device) -> Samples:
    """Return the samples of a map; made once and kept, some 12 bytes for each."""
    rows, columns = axis_taps(grid)
    found = [_of_block(block, rows, columns) for block in blocks(grid, heads)]
    slots, sources, targets = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.argsort(targets, kind="stable")
    slots, sources, targets = slots[order], sources[order], targets[order]
    counts = np.bincount(targets, minlength=prod(grid.map_size) * heads)
    sample_of_slot = np.full(blocks(grid, heads)[-1].stop, len(slots))
    sample_of_slot[slots] = np.arange(len(slots))

    def tensor(array: np.ndarray, dtype: type) -> Tensor:
        return torch.from_numpy(array.astype(dtype)).to(device)

    return Samples(
        tensor(slots, np.int64),
        tensor(sources, np.int32),
        tensor(targets, np.int32),
        tensor(np.concatenate([[0], counts.cumsum()]), np.int32),
        tensor(sample_of_slot, np.int64),
    )


def _of_block(block: Block, rows: AxisTaps, columns: AxisTaps) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return slots, sources and targets of one phase."""
    heads = block.shape[0]
    head = np.arange(heads)[:, None, None, None, None]
    i, source_i, cell_i, tap_i = (x[None, :, None, :, None] for x in _along(rows, block.row))
    j, source_j, cell_j, tap_j = (x[None, None, :, None, :] for x in _along(columns, block.column))
    _, I, J, height, width = block.shape  # noqa: E741
    slots = block.start + (((head * I + tap_i) * J + tap_j) * height + cell_i) * width + cell_j
    targets = (i * columns.size + j) * heads + head
    sources = (source_i * columns.size + source_j) * heads + head
    here = _inside(cell_i, height) & _inside(cell_j, width)
    there = _inside(source_i, rows.size) & _inside(source_j, columns.size)
    kept = np.broadcast_to(here & there, slots.shape)
    return slots[kept], np.broadcast_to(sources, slots.shape)[kept], np.broadcast_to(targets, slots.shape)[kept]


def _along(axis: AxisTaps, phase: Phase) -> Iterator[np.ndarray]:
    """Yield pixel, source pixel, cell and displacement, each of shape (pixels, displacements)."""
    k, tap = np.arange(phase.pixels)[:, None], np.arange(phase.displacements)[None, :]
    pixel = phase.first_pixel + axis.stride * k
    for array in (pixel, pixel + phase.first_displacement + tap, phase.first_cell + k, tap):
        yield np.broadcast_to(array, (phase.pixels, phase.displacements))


def _inside(index: np.ndarray, size: int) -> np.ndarray:
    return (index >= 0) & (index < size)
