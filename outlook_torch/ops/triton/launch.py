"""Launch the Triton kernels: which of them, which tiles, which dtypes, on which device."""

from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from outlook_common.geometry import WindowGrid
from outlook_torch.ops.triton import pairs
from outlook_torch.ops.triton.kernels import attend_kernel, gradient_kernel, transpose_kernel
from outlook_torch.ops.triton.rolled import rolled_gradient_kernel, rolled_mix_kernel

# At most so many logits of one window: more would take more registers than there are, and minutes to compile.
UNROLLED = 81
# A program of the unrolled kernels: 4 warps, of which 8 threads that read 16 bytes each share a row of D channels, as
# memory is read in 128 bytes.
WARPS = 4
THREADS = 32 * WARPS
LANES = 8
VECTOR_BYTES = 16
# How many numbers a tile of the rolled kernels holds, and how many channels at most.
TILE = 2**9
CHANNELS = 128
REGISTERS = 128  # of a thread of theirs; left to choose, ptxas (sm_90) takes 96 and spills some
INT32_ELEMENTS = 2**30  # in larger tensors, offsets are computed in int64

_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True)
class Launch:
    """A kernel, how many programs of it, and its arguments by name."""

    kernel: Any
    programs: tuple[int, ...]
    arguments: dict[str, Any]

    def __call__(self) -> None:
        """Run it."""
        self.kernel[self.programs](**self.arguments)


def attend(value: Tensor, logits: Tensor, dropout_mask: Tensor | None, grid: WindowGrid) -> Tensor:
    """Return outlook attention of `value`, (B, H, W, N, D)."""
    out = _empty(value, grid)
    if out.numel() > 0:
        _run(forward(value, logits, dropout_mask, out, grid), on=value)
    return out


def attend_backward(
    cotangent: Tensor, value: Tensor, logits: Tensor, dropout_mask: Tensor | None, grid: WindowGrid
) -> tuple[Tensor, Tensor]:
    """Return the gradients of value and logits."""
    d_value, d_logits = _empty(value, grid), torch.empty_like(logits, memory_format=torch.contiguous_format)
    if value.numel() == 0:
        return d_value, d_logits.zero_()
    _run(backward(cotangent, value, logits, dropout_mask, d_value, d_logits, grid), on=value)
    return d_value, d_logits


def forward(
    value: Tensor, logits: Tensor, dropout_mask: Tensor | None, out: Tensor, grid: WindowGrid
) -> tuple[Launch, ...]:
    """Return the launches that write `out`."""
    value, operands = value.contiguous(), _contiguous(logits=logits, dropout_mask=dropout_mask)
    if not is_unrolled(grid):
        arguments = operands | _rolled_arguments(value, logits, dropout_mask, grid)
        return (_rolled_mix(value, out, arguments, grid),)
    arguments = operands | _arguments(value, logits, dropout_mask, grid)
    return (_launch(attend_kernel, arguments, value=value, out=out),)


def backward(
    cotangent: Tensor,
    value: Tensor,
    logits: Tensor,
    dropout_mask: Tensor | None,
    d_value: Tensor,
    d_logits: Tensor,
    grid: WindowGrid,
) -> tuple[Launch, ...]:
    """Return the launches that write `d_value` and `d_logits`."""
    operands = _contiguous(cotangent=cotangent, value=value, logits=logits, dropout_mask=dropout_mask)
    if not is_unrolled(grid):
        return _rolled_backward(operands, d_value, d_logits, grid)
    arguments = operands | _arguments(value, logits, dropout_mask, grid)
    (K, L), (S, T) = grid.kernel_size, grid.stride
    slots = pairs.slots(K, L, S, T, arguments["G"])
    merged = value.new_empty(arguments["rows"], slots, dtype=torch.promote_types(value.dtype, torch.float32))
    return (
        _launch(gradient_kernel, arguments, gradient=d_logits, merged=merged),
        _launch(transpose_kernel, arguments, gradient=d_value, merged=merged),
    )


def is_unrolled(grid: WindowGrid) -> bool:
    """Return whether the kernels with all taps unrolled take these windows."""
    return grid.places**2 <= UNROLLED


def _empty(value: Tensor, grid: WindowGrid) -> Tensor:
    # The unrolled kernels write nothing into gaps between windows.
    gaps = any(s > k for s, k in zip(grid.stride, grid.kernel_size, strict=True))
    make = torch.zeros_like if gaps else torch.empty_like
    return make(value, memory_format=torch.contiguous_format)


def _contiguous(**operands: Tensor | None) -> dict[str, Tensor | None]:
    return {name: None if x is None else x.contiguous() for name, x in operands.items()}


def _launch(kernel: Any, arguments: dict[str, Any], **more: Any) -> Launch:
    names = (*kernel.arg_names, "num_warps", "maxnreg")
    chosen = {name: argument for name, argument in (arguments | more).items() if name in names}
    return Launch(kernel, (-(-arguments["rows"] // arguments["ROWS"]),), chosen)


def _run(launches: tuple[Launch, ...], on: Tensor) -> None:
    # Triton launches on the current device, whatever the tensors lie on.
    with torch.cuda.device(on.device) if on.is_cuda else nullcontext():
        for launch in launches:
            launch()


def _arguments(value: Tensor, logits: Tensor, dropout_mask: Tensor | None, grid: WindowGrid) -> dict[str, Any]:
    """Return what the unrolled kernels take beside tensors, by name."""
    tiles = tile(value.shape[-1], value.element_size())
    # With stride 1, two cells read 30 sources for 50 taps, which pays where D is long; with others a cell has several
    # pixels as it is.
    G = 2 if grid.stride[1] == 1 and value.shape[-1] > tiles["LANES"] * tiles["VECTOR"] else 1
    blocks_i, blocks_j = _blocks(grid, 0, 1), _blocks(grid, 1, G)
    return {
        **_sizes(value, logits, dropout_mask, grid),
        "WEIGHT": _DTYPES[value.dtype],
        "rows": value.shape[0] * blocks_i * blocks_j * value.shape[3],
        "blocks_i": blocks_i,
        "blocks_j": blocks_j,
        "G": G,
        **tiles,
        "num_warps": WARPS,
    }


def tile(D: int, size: int) -> dict[str, int]:
    """Return the tile of a program of the unrolled kernels, for numbers of `size` bytes."""
    vector = min(_power_of_two(D), VECTOR_BYTES // size)
    lanes = min(_power_of_two(-(-D // vector)), LANES)
    return {"ROWS": THREADS // lanes, "LANES": lanes, "VECTOR": vector}


def _blocks(grid: WindowGrid, axis: int, cells: int) -> int:
    """Return how many blocks hold all windows' rows and all pixels of the map along an axis."""
    K, S, P = grid.kernel_size[axis], grid.stride[axis], grid.padding[axis]
    of_windows, of_pixels = grid.grid[axis] + (K - 1) // S, (P + grid.map_size[axis] - 1) // S + 1
    return -(-max(of_windows, of_pixels) // cells)


def _sizes(value: Tensor, logits: Tensor, dropout_mask: Tensor | None, grid: WindowGrid) -> dict[str, Any]:
    """Return what all kernels take, by name."""
    (H, W), (h, w), (N, D) = grid.map_size, grid.grid, value.shape[3:]
    (K, L), (S, T), (P, Q) = grid.kernel_size, grid.stride, grid.padding
    return {
        **{"H": H, "W": W, "h": h, "w": w, "N": N, "D": D, "K": K, "L": L, "S": S, "T": T, "P": P, "Q": Q},
        "MASKED": dropout_mask is not None,
        "PROBABILITY": _DTYPES[_softmax_dtype(logits, dropout_mask)],
        "SUM": _DTYPES[torch.promote_types(value.dtype, torch.float32)],
        "INDEX": tl.int64 if max(value.numel(), logits.numel()) > INT32_ELEMENTS else tl.int32,
    }


def _rolled_arguments(value: Tensor, logits: Tensor, dropout_mask: Tensor | None, grid: WindowGrid) -> dict[str, Any]:
    """Return what both rolled kernels take beside tensors, by name."""
    padded, columns = _power_of_two(grid.places), min(_power_of_two(value.shape[-1]), CHANNELS)
    tiles = {"PADDED": padded, "ROWS": max(1, TILE // max(padded, columns)), "COLUMNS": columns}
    return _sizes(value, logits, dropout_mask, grid) | tiles | {"num_warps": WARPS, "maxnreg": REGISTERS}


def _rolled_mix(
    source: Tensor,
    out: Tensor,
    arguments: dict[str, Any],
    grid: WindowGrid,
    tops: Tensor | None = None,
    totals: Tensor | None = None,
) -> Launch:
    """Return the launch of outlook attention of `source`, or of its transpose if `tops` and `totals` are given."""
    rows = source.shape[0] * prod(grid.grid) * source.shape[3]
    more = {"source": source, "out": out, "rows": rows, "tops": tops, "totals": totals}
    more |= {"TRANSPOSED": tops is not None, "WEIGHT": _DTYPES[source.dtype]}
    mix = _launch(rolled_mix_kernel, arguments | more)
    columns = -(-source.shape[-1] // arguments["COLUMNS"])
    return Launch(mix.kernel, (mix.programs[0] * prod(grid.stride), columns), mix.arguments)


def _rolled_backward(
    operands: dict[str, Any], d_value: Tensor, d_logits: Tensor, grid: WindowGrid
) -> tuple[Launch, ...]:
    value, logits, dropout_mask = (operands[name] for name in ("value", "logits", "dropout_mask"))
    arguments = operands | _rolled_arguments(value, logits, dropout_mask, grid)
    tops, totals = (logits.new_empty(logits.shape[:-1], dtype=_softmax_dtype(logits, dropout_mask)) for _ in range(2))
    statistics = {"tops": tops, "totals": totals}
    return (
        _launch(rolled_gradient_kernel, arguments | {"rows": tops.numel(), "gradient": d_logits} | statistics),
        _rolled_mix(operands["cotangent"], d_value, arguments, grid, **statistics),
    )


def _softmax_dtype(logits: Tensor, dropout_mask: Tensor | None) -> torch.dtype:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return dtype if dropout_mask is None else torch.promote_types(dtype, dropout_mask.dtype)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
