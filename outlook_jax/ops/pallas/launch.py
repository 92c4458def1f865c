"""Start the kernels: which blocks, which scratch, padded how."""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from outlook_common.geometry import WindowGrid
from outlook_jax.ops.manual_axes import struct_like
from outlook_jax.ops.pallas import batch_launch
from outlook_jax.ops.pallas.cells import LANES, SUBLANES, Cells, first_loaded, lay_out, round_up
from outlook_jax.ops.pallas.gram_kernel import GRAM_SCRATCH, gram_kernel
from outlook_jax.ops.pallas.mix_kernel import MIX_SCRATCH, mix_kernel
from outlook_jax.ops.pallas.moves import padded_rows
from outlook_jax.ops.pallas.shapes import Shaped, sums_dtype

VMEM = 96 * 2**20  # of 128 MiB in one core of v5e and v6e
LANES_AT_ONCE = 1024  # of a block, about: what the registers hold of eight channels


def mix(
    value: Float[Array, "B H W N D"],
    logits: Float[Array, "B h w N KK KK"],
    *masks: Float[Array, "B h w N KK KK"],
    grid: WindowGrid,
    swapped: bool,
    interpret: bool,
) -> Float[Array, "B H W N D"]:
    """Return outlook attention of `value`, or, `swapped`, its transpose."""
    if value.size == 0:
        return value
    if batch_launch.fits(grid, value, logits, masks):
        return batch_launch.mix(value, logits, masks, grid, swapped=swapped, interpret=interpret)
    name = "outlook_attention" + "_transposed" * swapped
    kernel = partial(mix_kernel, swapped=swapped)
    out = _start(kernel, name, MIX_SCRATCH, (value,), (logits, *masks), grid, like=value, interpret=interpret)
    return out.reshape(*value.shape[:4], -1)[..., : value.shape[4]]


def gram(
    cotangent: Float[Array, "B H W N D"],
    value: Float[Array, "B H W N D"],
    logits: Float[Array, "B h w N KK KK"],
    *masks: Float[Array, "B h w N KK KK"],
    grid: WindowGrid,
    interpret: bool,
) -> Float[Array, "B h w N KK KK"]:
    """Return the gradient of sum(outlook attention * cotangent) by `logits`."""
    if value.size == 0:
        return jnp.zeros_like(logits)
    if batch_launch.fits(grid, value, logits, masks):
        return batch_launch.gram(cotangent, value, logits, masks, grid, interpret=interpret)
    operands = (cotangent, value), (logits, *masks)
    name = "outlook_attention_logits_gradient"
    out = _start(gram_kernel, name, GRAM_SCRATCH, *operands, grid, like=logits, interpret=interpret)
    return out.reshape(logits.shape)


def _start(
    kernel: Callable[..., None],
    name: str,
    scratch: tuple[str, ...],
    maps: tuple[Array, ...],
    windows: tuple[Array, ...],
    grid: WindowGrid,
    *,
    like: Array,
    interpret: bool,
) -> Array:
    """Run a kernel on all blocks of all maps; return what is `like` one of the operands, heads and all on one axis."""
    N, D = maps[0].shape[3:]
    masked = len(windows) > 1
    cells, depth = cells_of(grid, maps[-1], windows[0], windows[1] if masked else None), round_up(D, SUBLANES)
    flat = {id(x): x.reshape(*x.shape[:3], -1) for x in windows}
    for x in maps:
        flat[id(x)] = jnp.pad(x, ((0, 0),) * 4 + ((0, depth - D),)).reshape(*x.shape[:3], N * depth)
    out = flat[id(like)]
    wide = sums_dtype(maps[0], windows[0])
    shapes = scratch_shapes(cells, N, N * depth, masked=masked)
    out_rows = cells.rows * (grid.stride[0] if any(like is x for x in maps) else 1)
    return pl.pallas_call(
        partial(kernel, cells=cells, heads=N, masked=masked),
        grid=(out.shape[0], cells.blocks),
        in_specs=[
            *(_with_halo(cells, flat[id(x)], grid.stride[0]) for x in maps),
            *(_with_halo(cells, flat[id(x)], 1) for x in windows),
        ],
        out_specs=pl.BlockSpec((None, out_rows, *out.shape[2:]), lambda b, r: (b, r, 0, 0)),
        out_shape=struct_like(out),
        scratch_shapes=[pltpu.VMEM(shapes[name], wide) for name in scratch],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM),
        interpret=interpret,
        name=name,
    )(*(flat[id(x)] for x in (*maps, *windows)))


def cells_of(grid: WindowGrid, value: Shaped, logits: Shaped, dropout_mask: Shaped) -> Cells:
    """Return the blocks of a map: all of it if that is few enough lanes and bytes, else as many rows as are."""
    whole = lay_out(grid, grid.grid[0])
    if whole.lanes <= LANES_AT_ONCE and vmem_bytes(whole, value, logits, dropout_mask) <= VMEM:
        return whole
    rows = max(1, min(whole.rows - 1, LANES_AT_ONCE // whole.pitch - 2 * whole.reach))
    while rows > 1 and vmem_bytes(lay_out(grid, rows), value, logits, dropout_mask) > VMEM:
        rows -= 1
    return lay_out(grid, rows)


def vmem_bytes(cells: Cells, value: Shaped, logits: Shaped, dropout_mask: Shaped) -> int:
    """Return about how much VMEM the larger kernel, the gradient of the logits, takes."""
    N, D = value.shape[3:]
    channels, masked = N * round_up(D, SUBLANES), dropout_mask is not None
    wide = sums_dtype(value, logits)
    shapes = scratch_shapes(cells, N, channels, masked=masked)
    scratch = sum(prod(shapes[name]) for name in GRAM_SCRATCH) * wide.itemsize
    pixels = cells.loaded * cells.grid.stride[0] * round_up(cells.grid.map_size[1], 16) * round_up(channels, LANES)
    windows = cells.loaded * round_up(cells.grid.grid[1], 16) * round_up(prod(logits.shape[3:]), LANES)
    # Two maps and two or three arrays of windows; the next block arrives while one is computed.
    return scratch + 2 * (2 * pixels * value.dtype.itemsize + (2 + masked) * windows * logits.dtype.itemsize)


def _with_halo(cells: Cells, x: Array, step: int) -> pl.BlockSpec:
    """Return the blocks of (B, rows, columns, F), `step` rows to a cell, with their halo."""
    _, rows, *minor = x.shape
    count = min(cells.loaded * step, rows)
    shape: Any = (pl.Squeezed(), pl.Element(count), *map(pl.Element, minor))

    def first(b: Array, r: Array) -> tuple[Any, ...]:
        return b, first_loaded((r * cells.rows - cells.halo) * step, rows, count), 0, 0

    return pl.BlockSpec(shape, first)


def scratch_shapes(cells: Cells, heads: int, channels: int, *, masked: bool) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what the kernels keep in VMEM, by name."""
    (S, T), places, w = cells.grid.stride, cells.grid.places, cells.grid.grid[1]
    lanes, taps = cells.lanes, len(cells.taps())
    tiles, groups = lanes // LANES, round_up(heads * places, SUBLANES)
    # The last eight rows (head, p) may reach past the features.
    features, columns = padded_rows(groups * places), padded_rows(channels)
    return {
        "window_stage": (lanes, features),
        "logits": (tiles, features, LANES),
        "mask": (tiles, features, LANES) if masked else (1, SUBLANES, LANES),
        "weights": (places, tiles, groups, LANES),
        "merged": (taps, tiles, round_up(heads, SUBLANES), LANES),
        "products": (taps, tiles, heads * SUBLANES, LANES),
        "stage": (S * T, lanes, columns),
        "line": (columns // LANES, round_up(w * T, SUBLANES), LANES),
        "value": (S * T, columns, lanes),
        "cotangent": (S * T, columns, lanes),
    }
