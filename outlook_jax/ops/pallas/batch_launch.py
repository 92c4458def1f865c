"""Start the kernels for whole tiles of images."""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from outlook_common.geometry import WindowGrid
from outlook_jax.ops.manual_axes import struct_like
from outlook_jax.ops.pallas import batch_kernels
from outlook_jax.ops.pallas.batch_kernels import GRAM_SCRATCH, MIX_SCRATCH, Blocks
from outlook_jax.ops.pallas.cells import LANES, SUBLANES, first_loaded, lay_out, round_up
from outlook_jax.ops.pallas.shapes import Shaped, sums_dtype

VMEM = 100 * 2**20  # of 128 MiB in one core of v5e and v6e


def fits(grid: WindowGrid, value: Shaped, logits: Shaped, masks: tuple[Shaped, ...]) -> bool:
    """Return whether the images fill the lanes, and VMEM holds one row of windows of each kernel."""
    if value.shape[0] == 0 or value.shape[0] % LANES:
        return False
    return all(
        vmem_bytes(blocks_of(grid, value, 1, gram=gram), value, logits, masks, gram=gram) <= VMEM
        for gram in (False, True)
    )


def mix(
    value: Array, logits: Array, masks: tuple[Array, ...], grid: WindowGrid, *, swapped: bool, interpret: bool
) -> Array:
    """Return outlook attention of `value`, or, `swapped`, its transpose."""
    blocks = blocks_for(grid, value, logits, masks, gram=False)
    kernel = partial(batch_kernels.mix_kernel, blocks=blocks, masked=bool(masks), swapped=swapped)
    name = "outlook_attention" + "_transposed" * swapped
    out = _start(kernel, name, MIX_SCRATCH, blocks, (value,), (logits, *masks), out_map=True, interpret=interpret)
    B, H, W, N, D = value.shape
    return jnp.transpose(out, (3, 0, 1, 2)).reshape(B, H, W, N, -1)[..., :D]


def gram(
    cotangent: Array, value: Array, logits: Array, masks: tuple[Array, ...], grid: WindowGrid, *, interpret: bool
) -> Array:
    """Return the gradient of sum(outlook attention * cotangent) by `logits`."""
    blocks = blocks_for(grid, value, logits, masks, gram=True)
    kernel = partial(batch_kernels.gram_kernel, blocks=blocks, masked=bool(masks))
    operands = (cotangent, value), (logits, *masks)
    name = "outlook_attention_logits_gradient"
    out = _start(kernel, name, GRAM_SCRATCH, blocks, *operands, out_map=False, interpret=interpret)
    return jnp.transpose(out, (3, 0, 1, 2)).reshape(logits.shape)


def blocks_of(grid: WindowGrid, value: Shaped, rows: int, *, gram: bool) -> Blocks:
    """Return blocks of `rows` rows of windows."""
    K, S, P, H = (sizes[0] for sizes in (grid.kernel_size, grid.stride, grid.padding, grid.map_size))
    cells = lay_out(grid, grid.grid[0])
    up = [place.offset[0] for place in cells.places]
    left = [abs(place.offset[1]) for place in cells.places]
    depth = _depth(value)
    chunk = next(n for n in (32, 16, 8) if depth % n == 0)
    common = {"cells": cells, "rows": rows, "heads": value.shape[3], "chunk": chunk}
    if gram:  # windows [k, k + rows), and all pixels that they cover
        return Blocks(
            **common, windows_above=0, windows=rows, pixels_above=P, pixels=min(H, S * (rows - 1) + K), margin=0
        )
    above, below = max(0, *up), max(0, *(-x for x in up))
    return Blocks(
        **common,
        windows_above=above,
        windows=min(grid.grid[0], above + rows + below),
        pixels_above=K - 1,
        pixels=min(H, S * rows + 2 * (K - 1)),
        margin=max(left),
    )


def _depth(value: Shaped) -> int:
    """Return the channels of one head, padded to whole tiles of `value`'s dtype."""
    return round_up(value.shape[4], SUBLANES * max(1, 4 // value.dtype.itemsize))


def blocks_for(grid: WindowGrid, value: Shaped, logits: Shaped, masks: tuple[Shaped, ...], *, gram: bool) -> Blocks:
    """Return the largest blocks that VMEM holds."""
    for rows in range(grid.grid[0], 0, -1):
        blocks = blocks_of(grid, value, rows, gram=gram)
        # Blocks of equal size: a last one that is nearly empty costs as much as the others.
        even = -(-grid.grid[0] // rows) * rows - grid.grid[0] < rows // 2 or rows == 1
        if even and vmem_bytes(blocks, value, logits, masks, gram=gram) <= VMEM:
            return blocks
    return blocks


def vmem_bytes(blocks: Blocks, value: Shaped, logits: Shaped, masks: tuple[Shaped, ...], *, gram: bool) -> int:
    """Return about how much VMEM a kernel takes."""
    grid = blocks.cells.grid
    shapes = _scratch(blocks, masked=bool(masks))
    scratch = (
        sum(prod(shapes[name]) for name in (GRAM_SCRATCH if gram else MIX_SCRATCH)) * sums_dtype(value, logits).itemsize
    )
    row = grid.map_size[1] * blocks.heads * _depth(value) * LANES * value.dtype.itemsize
    window_row = grid.grid[1] * round_up(prod(logits.shape[3:]), 16) * LANES * logits.dtype.itemsize
    read = blocks.pixels * (1 + gram) * row + blocks.windows * (1 + len(masks)) * window_row
    written = blocks.rows * (window_row if gram else grid.stride[0] * row)
    return scratch + 2 * (read + written)  # the next block arrives while one is computed


def _scratch(blocks: Blocks, *, masked: bool) -> dict[str, tuple[int, ...]]:
    grid, heads = blocks.cells.grid, blocks.heads
    # The last eight rows (head, p) may reach past the features.
    features = round_up(heads * grid.places, SUBLANES) * grid.places
    return {
        "slab": (1, features, LANES),
        "mask": (1, features if masked else SUBLANES, LANES),
        "weights": (blocks.windows + 2, grid.grid[1] + 2 * blocks.margin, 1, features, LANES),
        "merged": (len(blocks.cells.taps()), 1, round_up(heads, SUBLANES), LANES),
        "products": (1, features, LANES),
        "sums": (grid.places**2, heads * SUBLANES, LANES),
    }


def _start(
    kernel: Callable[..., None],
    name: str,
    scratch: tuple[str, ...],
    blocks: Blocks,
    maps: tuple[Array, ...],
    windows: tuple[Array, ...],
    *,
    out_map: bool,
    interpret: bool,
) -> Array:
    grid, depth = blocks.cells.grid, _depth(maps[-1])
    step = grid.stride[0]
    pad = ((0, 0),) * 4 + ((0, depth - maps[-1].shape[4]),)
    flat = [_images_last(jnp.pad(x, pad)) for x in maps]
    flat_windows = [_images_last(x) for x in windows]
    like = flat[-1] if out_map else flat_windows[0]
    out_rows = blocks.rows * (step if out_map else 1)
    shapes = _scratch(blocks, masked=len(windows) > 1)
    return pl.pallas_call(
        kernel,
        grid=(like.shape[3] // LANES, -(-grid.grid[0] // blocks.rows)),
        in_specs=[
            *(_rows(x, blocks.rows * step, blocks.pixels_above, blocks.pixels) for x in flat),
            *(_rows(x, blocks.rows, blocks.windows_above, blocks.windows) for x in flat_windows),
        ],
        out_specs=pl.BlockSpec((out_rows, *like.shape[1:3], LANES), lambda b, r: (r, 0, 0, b)),
        out_shape=struct_like(like),
        scratch_shapes=[pltpu.VMEM(shapes[key], sums_dtype(maps[-1], windows[0])) for key in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM + 2**23
        ),
        interpret=interpret,
        name=name + "_of_images",
    )(*flat, *flat_windows)


def _images_last(x: Array) -> Array:
    return jnp.transpose(x.reshape(*x.shape[:3], -1), (1, 2, 3, 0))


def _rows(x: Array, step: int, above: int, count: int) -> pl.BlockSpec:
    """Return blocks of `count` rows, `step` apart, of (rows, columns, F, B), the first `above` rows above the map."""
    rows, columns, F, _ = x.shape
    shape = (pl.Element(count), pl.Element(columns), pl.Element(F), pl.Element(LANES))

    def first(b: Array, r: Array) -> tuple[Any, ...]:
        return first_loaded(r * step - above, rows, count), 0, 0, pl.multiple_of(b * LANES, LANES)

    return pl.BlockSpec(shape, first)
