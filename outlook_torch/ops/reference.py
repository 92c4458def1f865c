"""Reference implementation by definition: unfold, weighted sum, fold (VOLO, section 3.1)."""

from functools import reduce
from itertools import product

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, fx

from outlook_common.dispatch import Implementation
from outlook_common.geometry import WindowGrid
from outlook_torch.ops.symbolic import every, interleaved


def reference(
    value: Float[Tensor, "B H W N D"],
    logits: Float[Tensor, "B h w N KK KK"],
    dropout_mask: Float[Tensor, "B h w N KK KK"] | None,
    grid: WindowGrid,
) -> Float[Tensor, "B H W N D"]:
    """Return fold(softmax(logits) @ unfold(value)); operands as in `outlook_attention`, already checked."""
    # Softmax and sums run in float32 at least; the probabilities are rounded to value's dtype in between.
    probabilities = widened(logits).softmax(dim=-1)
    if dropout_mask is not None:
        probabilities = probabilities * dropout_mask
    probabilities = widened(probabilities.to(value.dtype))

    windows = _unfold(widened(value), grid)  # B h w N KK D
    mixed = _mixed_by_place if any(isinstance(size, torch.SymInt) for size in grid.grid) else torch.matmul
    return _fold(mixed(probabilities, windows), grid).to(value.dtype)


def _mixed_by_place(
    probabilities: Float[Tensor, "B h w N KK KK"], windows: Float[Tensor, "B h w N KK D"]
) -> Float[Tensor, "B h w N KK D"]:
    # A matrix product merges the leading axes into one and splits it again, and torch.export wants proof that symbolic
    # sizes divide their product.
    terms = zip(probabilities.unbind(-1), windows.unbind(-2), strict=True)
    return reduce(torch.add, (weight[..., None] * value[..., None, :] for weight, value in terms))


def widened(x: Tensor) -> Tensor:
    """Return `x` in the dtype that softmax and sums run in; a function of its own in the graphs of torch.fx."""
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x


fx.wrap("widened")


def _unfold(value: Float[Tensor, "B H W N D"], grid: WindowGrid) -> Float[Tensor, "B h w N KK D"]:
    B, H, W, N, D = value.shape
    h, w = grid.grid
    channels_first = value.permute(0, 3, 4, 1, 2).reshape(B, N * D, H, W)
    if torch.compiler.is_compiling():
        windows = _unfold_by_slices(channels_first, grid)
    else:
        windows = F.unfold(channels_first, grid.kernel_size, padding=grid.padding, stride=grid.stride)
    return windows.reshape(B, N, D, grid.places, h, w).permute(0, 4, 5, 1, 3, 2)


def _fold(windows: Float[Tensor, "B h w N KK D"], grid: WindowGrid) -> Float[Tensor, "B H W N D"]:
    B, h, w, N, KK, D = windows.shape
    columns = windows.permute(0, 3, 5, 4, 1, 2)
    if torch.compiler.is_compiling():
        folded = _fold_by_slices(columns.contiguous().flatten(1, 2), grid)
    else:
        columns = columns.reshape(B, N * D * KK, h * w)
        folded = F.fold(columns, grid.map_size, grid.kernel_size, padding=grid.padding, stride=grid.stride)
    return folded.reshape(B, N, D, *grid.map_size).permute(0, 3, 4, 1, 2)


# The CPU compiler of PyTorch 2.13 writes out of bounds for F.fold, and so for the gradient of F.unfold, at stride 2
# (the process dies in free()). Under torch.compile and torch.export the same windows move as slices and sums.


def _unfold_by_slices(value: Float[Tensor, "B C H W"], grid: WindowGrid) -> Float[Tensor, "B C KK h w"]:
    (h, w), (row_stride, column_stride), (rows, columns) = grid.grid, grid.stride, grid.padding
    padded = F.pad(value, (columns, columns, rows, rows))
    lines = [every(padded, 2, i, row_stride, h) for i in range(grid.kernel_size[0])]
    places = [every(line, 3, j, column_stride, w) for line in lines for j in range(grid.kernel_size[1])]
    return torch.stack(places, dim=2)


def _fold_by_slices(columns: Float[Tensor, "B C KK h w"], grid: WindowGrid) -> Float[Tensor, "B C H W"]:
    # Place r + S*m of window c lies on row S*(c+m) + r of the padded map: the rows of one phase r are a sum of windows
    # shifted by m, and the map is its phases interleaved.
    (K, L), (S, T), (top, left), (H, W) = grid.kernel_size, grid.stride, grid.padding, grid.map_size
    places = columns.unflatten(2, (K, L))  # type: ignore[no-untyped-call]
    # How far windows are shifted at most, and at least so far that the map reaches its last row and column.
    M, N = (max((k - 1) // s, -(-p // s)) for k, s, p in zip((K, L), (S, T), (top, left), strict=True))
    nothing = torch.zeros_like(places[:, :, 0, 0])

    def phase(r: int, t: int) -> Tensor:
        shifted = [
            F.pad(places[:, :, i, j], (j // T, N - j // T, i // S, M - i // S))
            for i, j in product(range(r, K, S), range(t, L, T))
        ]
        return reduce(torch.add, shifted or [F.pad(nothing, (0, N, 0, M))])

    lines = [interleaved([phase(r, t) for t in range(T)], 3, left, W) for r in range(S)]
    return interleaved(lines, 2, top, H)


REFERENCE = Implementation(run=reference, refusal=lambda *operands: None)
