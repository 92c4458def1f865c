"""Window geometry of outlook attention, and its validation.

Letters, throughout the project:

    B batch        H, W  rows and columns of the map      h, w  rows and columns of the window grid
    *B any number of batch axes, or none
    N heads        D     channels per head                C     all channels, N * D
    K kernel size  S     stride                           P     padding
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from numbers import Integral
from typing import Any, SupportsIndex

IntOrPair = int | tuple[int, int]
# Of an array; sizes are symbolic in programs that are traced for any.
Shape = Sequence[Any]

FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")

_AXES = ("rows", "columns")


def to_pair(name: str, size: IntOrPair | Sequence[int], *, minimum: int) -> tuple[int, int]:
    """Return `size` as (rows, columns); an int stands for both.

    Raises:
        TypeError: `size` is neither an int nor a pair of ints.
        ValueError: an entry is below `minimum`.
    """
    pair = (size, size) if isinstance(size, Integral) else size
    if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(n, Integral) for n in pair)):
        raise TypeError(f"{name} must be an int or a pair of ints, got {size!r}")
    rows, columns = int(pair[0]), int(pair[1])
    if rows < minimum or columns < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {size!r}")
    return rows, columns


def grid_size(map_size: int, stride: int) -> int:
    """Return ceil(map_size / stride), the number of windows along one axis."""
    # Not -(-map_size // stride): of symbolic sizes, ONNX rounds the quotient of a negative number towards zero, and
    # PyTorch's compiler knows the number of windows of its pooling in this form.
    return (map_size - 1) // stride + 1


@dataclass(frozen=True)
class WindowGrid:
    """The windows on one map; fields are (rows, columns), in pixels except `grid`, which counts windows.

    Window (i, j) covers rows S*i-P … S*i-P+K-1, and columns likewise. Positions outside the map read as zero, and
    writes to them are dropped.
    """

    map_size: tuple[int, int]
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w), the number of windows."""
        return grid_size(self.map_size[0], self.stride[0]), grid_size(self.map_size[1], self.stride[1])

    @property
    def padded_size(self) -> tuple[int, int]:
        """(H + 2P, W + 2P)."""
        return self.map_size[0] + 2 * self.padding[0], self.map_size[1] + 2 * self.padding[1]

    @property
    def places(self) -> int:
        """K*K, the number of positions in a window."""
        return self.kernel_size[0] * self.kernel_size[1]


def window_grid(map_size: tuple[int, int], kernel_size: IntOrPair, stride: IntOrPair, padding: IntOrPair) -> WindowGrid:
    """Return the windows on a map of H rows and W columns.

    Raises:
        TypeError: a size is neither an int nor a pair of ints.
        ValueError: a size is not positive (`padding` may be zero), or the number of windows that fit,
            floor((H+2P-K)/S)+1, is not the ceil(H/S) for which weights are predicted; the message suggests a padding.
    """
    grid = WindowGrid(
        map_size=_size_of_map(map_size),
        kernel_size=to_pair("kernel_size", kernel_size, minimum=1),
        stride=to_pair("stride", stride, minimum=1),
        padding=to_pair("padding", padding, minimum=0),
    )
    for axis in (0, 1):
        _check_axis(axis, grid.map_size[axis], grid.kernel_size[axis], grid.stride[axis], grid.padding[axis])
    return grid


def _size_of_map(size: tuple[int, int]) -> tuple[int, int]:
    # Under torch.export and torch.jit.trace sizes may be symbolic, without a value.
    symbols = any(isinstance(n, SupportsIndex) and not isinstance(n, Integral) for n in size)
    return size if symbols else to_pair("the map's size", size, minimum=1)


def _windows_that_fit(map_size: int, kernel_size: int, stride: int, padding: int) -> int:
    return max(0, (map_size + 2 * padding - kernel_size) // stride + 1)


def _check_axis(axis: int, map_size: int, kernel_size: int, stride: int, padding: int) -> None:
    # "Same" padding fits any map. Deciding so without the map's size adds no guards to symbolic sizes (torch.export
    # with dynamic shapes).
    if 2 * padding == kernel_size - 1:
        return
    expected = grid_size(map_size, stride)
    found = _windows_that_fit(map_size, kernel_size, stride, padding)
    if found == expected:
        return
    fitting = [p for p in range(kernel_size + 1) if _windows_that_fit(map_size, kernel_size, stride, p) == expected]
    if fitting:
        remedy = f"padding={min(fitting, key=lambda p: abs(p - padding))} would fit"
    else:  # only with an even kernel_size
        remedy = f"no padding fits; kernel_size={kernel_size + 1} with padding={kernel_size // 2} always does"
    name = _AXES[axis]
    raise ValueError(
        f"the window grid does not fit the map's {name}: {map_size} {name} with kernel_size={kernel_size}, "
        f"stride={stride}, padding={padding} hold {found} windows, but stride={stride} predicts weights for "
        f"ceil({map_size}/{stride})={expected}; {remedy}"
    )


def one_batch_axis(x: Any, axes: int) -> Any:
    """Return an array of either framework with the axes before its last `axes` as one; None is None.

    An array that has one such axis is returned as it is.
    """
    if x is None or len(x.shape) == axes + 1:
        return x
    leading = len(x.shape) - axes
    return x.reshape((prod(x.shape[:leading]), *x.shape[leading:]))


def unmerged(x: Any, shape: Shape) -> Any:
    """Return an array with the shape that it had before `one_batch_axis`, itself if nothing was merged."""
    return x if len(x.shape) == len(shape) else x.reshape(shape)


def check_operands(
    value_shape: Shape,
    value_dtype: str,
    logits_shape: Shape,
    logits_dtype: str,
    mask_shape: Shape | None,
    mask_dtype: str | None,
    *,
    kernel_size: IntOrPair,
    stride: IntOrPair,
    padding: IntOrPair,
) -> WindowGrid:
    """Check the operands of `outlook_attention` against each other and return their window grid.

    Raises:
        TypeError: a dtype is not one of `FLOAT_DTYPES`.
        ValueError: a rank, size or grid does not fit.
    """
    for name, dtype in (("value", value_dtype), ("logits", logits_dtype), ("dropout_mask", mask_dtype)):
        if dtype is not None and dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name} must be one of {', '.join(FLOAT_DTYPES)}, got {dtype}")
    if len(value_shape) < 4:
        raise ValueError(f"value must have shape (*B, H, W, N, D), got {len(value_shape)} axes: {tuple(value_shape)}")
    *batch, rows, columns, heads, _ = value_shape
    grid = window_grid((rows, columns), kernel_size, stride, padding)
    expected = (*batch, *grid.grid, heads, grid.places, grid.places)
    if tuple(logits_shape) != expected:
        raise ValueError(
            f"logits must have shape (*B, h, w, N, K*K, K*K) = {expected} for value of shape {tuple(value_shape)} with "
            f"kernel_size={grid.kernel_size}, stride={grid.stride}, padding={grid.padding}, got {tuple(logits_shape)}"
        )
    if mask_shape is not None and tuple(mask_shape) != expected:
        raise ValueError(f"dropout_mask must have the shape of logits, {expected}, got {tuple(mask_shape)}")
    return grid


def check_layer_input(shape: Shape, dim: int) -> None:
    """Check that an input of `OutlookAttention` has shape (*B, H, W, C) with C = `dim`.

    Raises:
        ValueError: it has fewer than three axes or another number of channels.
    """
    if len(shape) < 3:
        raise ValueError(
            f"the input must have shape (*B, H, W, C), channels last, got {len(shape)} axes: {tuple(shape)}"
        )
    if shape[-1] != dim:
        hint = f"; axis {len(shape) - 3} is {dim}: is the input channels first?" if shape[-3] == dim else ""
        raise ValueError(f"the input must have dim={dim} channels on its last axis, got shape {tuple(shape)}{hint}")
