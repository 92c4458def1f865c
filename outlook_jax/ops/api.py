"""The op `outlook_attention`: check the operands, choose an implementation, run it."""

from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from outlook_common.constants import OP_CHECKPOINT_NAME
from outlook_common.dispatch import ImplementationRequest, check_implementation, choose
from outlook_common.geometry import IntOrPair, check_operands, one_batch_axis, unmerged
from outlook_jax.ops.by_rows import by_rows
from outlook_jax.ops.choice import IMPLEMENTATIONS, choose_by_platform
from outlook_jax.ops.explicit import on_automatic_axes
from outlook_jax.ops.pallas import on_tpu_or_interpreted


def outlook_attention(
    value: Float[Array, "*B H W N D"],
    logits: Float[Array, "*B h w N KK KK"],
    *,
    kernel_size: IntOrPair = 3,
    stride: IntOrPair = 1,
    padding: IntOrPair = 1,
    dropout_mask: Float[Array, "*B h w N KK KK"] | None = None,
    implementation: ImplementationRequest = None,
    precision: lax.PrecisionLike = None,
    rows_axis: str | None = None,
) -> Float[Array, "*B H W N D"]:
    """Outlook attention: fold(softmax(logits) @ unfold(value)). VOLO, section 3.1, equations 2 to 4.

    Args:
        value: (*B, H, W, N, D), the projected values; *B any batch axes or none, H*W map, N heads, D channels per head.
        logits: (*B, h, w, N, K*K, K*K), already scaled, h = ceil(H/S), w = ceil(W/S). Of the last two axes the first
            is the output place in the window, the second the input place, over which the softmax runs.
        kernel_size: K, in pixels, an int or (rows, columns).
        stride: S, in pixels, likewise.
        padding: P, in pixels, likewise. Places outside the map read as zero, and what falls there is dropped.
        dropout_mask: multiplies the probabilities, shape of `logits`: 0, or 1/(1-rate).
        implementation: None for the fastest on the platform that the program is lowered for, a name, or a sequence of
            names to try in order.
        precision: of the weighted sum, as in `jax.lax.dot_general`; None means `jax.default_matmul_precision`.
        rows_axis: inside `jax.shard_map`, the axis of the mesh whose devices share the rows of the map, each having its
            part of all operands: they exchange the borders of the values and of the results alone. Composite only.

    Returns:
        (*B, H, W, N, D) in the dtype of `value`. Softmax and sums run in float32 at least, the probabilities are
        rounded to the dtype of `value` in between. For policies of `jax.checkpoint` it is named "outlook_attention".

    Raises:
        TypeError: an operand is not float16, bfloat16, float32 or float64.
        ValueError: shapes do not fit each other, a size is not positive, the window grid does not fit the map, or
            `implementation` is unknown.
        NotImplementedError: the implementation asked for cannot run here (an ExceptionGroup of them for several).
    """
    grid = check_operands(
        value.shape,
        _dtype_name(value),
        logits.shape,
        _dtype_name(logits),
        None if dropout_mask is None else dropout_mask.shape,
        None if dropout_mask is None else _dtype_name(dropout_mask),
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
    )
    shape = value.shape
    value, logits, dropout_mask = one_batch_axis(value, 4), one_batch_axis(logits, 5), one_batch_axis(dropout_mask, 5)
    if rows_axis is not None:
        if "composite" not in check_implementation(implementation, IMPLEMENTATIONS):
            raise NotImplementedError(f"implementation {implementation!r} cannot share rows; composite can")
        return unmerged(by_rows(value, logits, dropout_mask, grid, rows_axis), shape)
    if implementation is None:
        run = choose_by_platform(value, logits, dropout_mask, grid)
    else:
        run = choose(_for_this_platform(implementation), IMPLEMENTATIONS, value, logits, dropout_mask, grid)

    def compute(value: Array, logits: Array, dropout_mask: Array | None) -> Array:
        return run(value, logits, dropout_mask, grid, precision=precision)

    out = on_automatic_axes(compute, value, value, logits, dropout_mask)
    named: Array = checkpoint_name(unmerged(out, shape), OP_CHECKPOINT_NAME)  # type: ignore[no-untyped-call]
    return named


def _for_this_platform(implementation: ImplementationRequest) -> ImplementationRequest:
    """Leave "pallas" out of several names where the default backend is no TPU.

    What a program is lowered for is not known while it is traced. Asked for alone, "pallas" is taken at its word.
    """
    if isinstance(implementation, str) or implementation is None or on_tpu_or_interpreted():
        return implementation
    return [name for name in implementation if name != "pallas"] or implementation


def _dtype_name(x: Array) -> str:
    return x.dtype.name
