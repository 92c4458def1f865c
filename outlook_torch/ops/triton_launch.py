"""Launch the Triton kernels: which tiles, which dtypes, on which device."""

from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from outlook_common.geometry import WindowGrid
from outlook_torch.ops.triton_kernels import logits_gradient_kernel, mix_kernel

# How many numbers a tile holds. With more than 4 for each of a program's 128 threads, ptxas (sm_90) wants over 128
# registers and spills some; whether that is slower, no GPU was asked yet.
TILE = 2**9
CHANNELS = 128  # at most, in one tile
INT32_ELEMENTS = 2**30  # in larger tensors, offsets are computed in int64

_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

Statistics = tuple[Tensor, Tensor]


def mix(
    source: Tensor,
    logits: Tensor,
    dropout_mask: Tensor | None,
    grid: WindowGrid,
    *,
    transposed_by: Statistics | None = None,
) -> Tensor:
    """Return outlook attention of `source`, (B, H, W, N, D), or its transpose, by what `logits_gradient` returned."""
    out = torch.empty_like(source, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    rows = source.shape[0] * prod(grid.grid) * source.shape[3]
    arguments = _arguments(source, logits, dropout_mask, grid)
    tiles = -(-rows // arguments["ROWS"]) * prod(grid.stride), -(-source.shape[-1] // arguments["COLUMNS"])
    tops, totals = transposed_by or (None, None)
    with _on_device(out):
        mix_kernel[tiles](
            source.contiguous(),
            tops=tops,
            totals=totals,
            out=out,
            rows=rows,
            TRANSPOSED=transposed_by is not None,
            WEIGHT=_DTYPES[source.dtype],
            **arguments,
        )
    return out


def logits_gradient(
    cotangent: Tensor, value: Tensor, logits: Tensor, dropout_mask: Tensor | None, grid: WindowGrid
) -> tuple[Tensor, Statistics]:
    """Return the gradient of the logits, and of each of their rows the largest and the sum of its exponentials."""
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    tops, totals = (logits.new_empty(logits.shape[:-1], dtype=_softmax_dtype(logits, dropout_mask)) for _ in range(2))
    if value.numel() == 0:
        return gradient.zero_(), (tops, totals)
    arguments = _arguments(value, logits, dropout_mask, grid)
    with _on_device(gradient):
        logits_gradient_kernel[(-(-tops.numel() // arguments["ROWS"]),)](
            cotangent.contiguous(),
            value.contiguous(),
            tops=tops,
            totals=totals,
            gradient=gradient,
            rows=tops.numel(),
            **arguments,
        )
    return gradient, (tops, totals)


def _arguments(value: Tensor, logits: Tensor, dropout_mask: Tensor | None, grid: WindowGrid) -> dict[str, Any]:
    """Return what both kernels take, by name."""
    (H, W), (h, w), (N, D) = grid.map_size, grid.grid, value.shape[3:]
    (K, L), (S, T), (P, Q) = grid.kernel_size, grid.stride, grid.padding
    padded, columns = _power_of_two(grid.places), min(_power_of_two(D), CHANNELS)
    wide = max(value.numel(), logits.numel()) > INT32_ELEMENTS
    return {
        "logits": logits.contiguous(),
        "dropout_mask": None if dropout_mask is None else dropout_mask.contiguous(),
        **{"H": H, "W": W, "h": h, "w": w, "N": N, "D": D, "K": K, "L": L, "S": S, "T": T, "P": P, "Q": Q},
        "MASKED": dropout_mask is not None,
        "PROBABILITY": _DTYPES[_softmax_dtype(logits, dropout_mask)],
        "SUM": _DTYPES[torch.promote_types(value.dtype, torch.float32)],
        "INDEX": tl.int64 if wide else tl.int32,
        "PADDED": padded,
        "ROWS": max(1, TILE // max(padded, columns)),
        "COLUMNS": columns,
    }


def _softmax_dtype(logits: Tensor, dropout_mask: Tensor | None) -> torch.dtype:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return dtype if dropout_mask is None else torch.promote_types(dtype, dropout_mask.dtype)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _on_device(x: Tensor) -> AbstractContextManager[Any]:
    # Triton launches on the current device, whatever the tensors lie on.
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
