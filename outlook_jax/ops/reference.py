"""Reference implementation by definition: unfold, weighted sum, fold (VOLO, section 3.1)."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float

from outlook_common.dispatch import Implementation
from outlook_common.geometry import WindowGrid


def reference(
    value: Float[Array, "B H W N D"],
    logits: Float[Array, "B h w N KK KK"],
    dropout_mask: Float[Array, "B h w N KK KK"] | None,
    grid: WindowGrid,
    precision: lax.PrecisionLike = None,
) -> Float[Array, "B H W N D"]:
    """Return fold(softmax(logits) @ unfold(value)); operands as in `outlook_attention`, already checked."""
    # Softmax and sums run in float32 at least; the probabilities are rounded to value's dtype in between.
    probabilities = jax.nn.softmax(logits.astype(at_least_float32(logits)), axis=-1)
    if dropout_mask is not None:
        probabilities = probabilities * dropout_mask
    sum_dtype = at_least_float32(value)
    probabilities = probabilities.astype(value.dtype).astype(sum_dtype)

    windows = _unfold(value.astype(sum_dtype), grid)
    mixed = jnp.einsum("bhwnpq,bhwnqd->bhwnpd", probabilities, windows, precision=precision)
    return _fold(mixed, grid).astype(value.dtype)


def at_least_float32(x: Array) -> DTypeLike:
    """Return the dtype that softmax and sums of `x` run in."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _unfold(value: Float[Array, "B H W N D"], grid: WindowGrid) -> Float[Array, "B h w N KK D"]:
    B, H, W, N, D = value.shape
    (h, w), (rows, columns) = grid.grid, grid.padding
    # XLA's patches are a convolution with one-hot kernels: at `HIGHEST` each finite value is copied exactly. An
    # infinity turns into NaN in the whole of its windows (0 * inf), where F.unfold would copy it.
    windows = lax.conv_general_dilated_patches(
        value.reshape(B, H, W, N * D),
        filter_shape=grid.kernel_size,
        window_strides=grid.stride,
        padding=((rows, rows), (columns, columns)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=lax.Precision.HIGHEST,
    )[:, :h, :w]
    return windows.reshape(B, h, w, N, D, grid.places).swapaxes(-1, -2)


def _fold(windows: Float[Array, "B h w N KK D"], grid: WindowGrid) -> Float[Array, "B H W N D"]:
    B, h, w, N, _, D = windows.shape
    rows, columns = (
        (stride * jnp.arange(n)[:, None] + jnp.arange(kernel)[None, :])  # (windows, places) -> padded coordinate
        for n, kernel, stride in zip((h, w), grid.kernel_size, grid.stride, strict=True)
    )
    places = jnp.moveaxis(windows.reshape(B, h, w, N, *grid.kernel_size, D), 3, 5)  # B h w K K N D
    padded = jnp.zeros((B, *grid.padded_size, N, D), windows.dtype)
    padded = padded.at[:, rows[:, None, :, None], columns[None, :, None, :]].add(places)
    (top, left), (H, W) = grid.padding, grid.map_size
    return padded[:, top : top + H, left : left + W]


REFERENCE = Implementation(run=reference, refusal=lambda *operands: None)
