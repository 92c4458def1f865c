"""Reference implementation by definition: unfold, weighted sum, fold (VOLO, section 3.1)."""

from itertools import product

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from outlook_common.dispatch import Implementation
from outlook_common.geometry import WindowGrid
from outlook_jax.ops.promotion import at_least_float32


def reference(
    value: Float[Array, "B H W N D"],
    logits: Float[Array, "B h w N KK KK"],
    dropout_mask: Float[Array, "B h w N KK KK"] | None,
    grid: WindowGrid,
    precision: lax.PrecisionLike = None,
) -> Float[Array, "B H W N D"]:
    """Return fold(softmax(logits) @ unfold(value)); operands as in `outlook_attention`, already checked.

    On a GPU XLA gives the unfold and its gradient to cuDNN, which is as deterministic as the algorithm it takes.
    """
    # Softmax and sums run in float32 at least; the probabilities are rounded to value's dtype in between.
    probabilities = jax.nn.softmax(logits.astype(at_least_float32(logits)), axis=-1)
    if dropout_mask is not None:
        wide = at_least_float32(probabilities, dropout_mask)
        probabilities = probabilities.astype(wide) * dropout_mask.astype(wide)
    sum_dtype = at_least_float32(value)
    probabilities = probabilities.astype(value.dtype).astype(sum_dtype)

    windows = _unfold(value.astype(sum_dtype), grid)
    mixed = jnp.einsum("bhwnpq,bhwnqd->bhwnpd", probabilities, windows, precision=precision)
    return _fold(mixed, grid).astype(value.dtype)


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
    places = windows.reshape(B, h, w, N, *grid.kernel_size, D)
    out = jnp.zeros((B, *grid.padded_size, N, D), windows.dtype)
    for place in product(*map(range, grid.kernel_size)):
        # One place of all windows lies on every S-th pixel. Not a scatter-add: GPUs add its terms in any order.
        zeros = [(0, 0, 0)] + [
            (first, size - first - stride * (n - 1) - 1, stride - 1)  # before, after, in between
            for first, size, stride, n in zip(place, grid.padded_size, grid.stride, grid.grid, strict=True)
        ]
        out += lax.pad(places[..., *place, :], jnp.zeros((), out.dtype), [*zeros, (0, 0, 0), (0, 0, 0)])
    # Cut off at the end: where devices share the rows, XLA's partitioner aborts at a negative padding with gaps.
    rows, columns = (slice(padding, padding + size) for padding, size in zip(grid.padding, grid.map_size, strict=True))
    return out[:, rows, columns]


REFERENCE = Implementation(run=reference, refusal=lambda *operands: None)
