"""The op `outlook_attention`: check the operands, choose an implementation, run it."""

import torch
from jaxtyping import Float
from torch import Tensor

from outlook_common.dispatch import Implementation, ImplementationRequest, choose
from outlook_common.geometry import IntOrPair, WindowGrid, check_operands, one_batch_axis, to_pair, unmerged
from outlook_torch.ops.composite import COMPOSITE
from outlook_torch.ops.reference import REFERENCE
from outlook_torch.ops.symbolic import is_symbolic
from outlook_torch.ops.triton import TRITON

# From fastest to slowest: the order that `implementation=None` tries.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "triton": TRITON,
    "composite": COMPOSITE,
    "reference": REFERENCE,
}

# Asked once: PyTorch 2.11 cannot trace the question, and marking it as constant imports the whole compiler.
_DEVICES = ("cpu", "cuda", "hpu", "ipu", "maia", "meta", "mps", "mtia", "xla", "xpu")
_AUTOCAST = frozenset(filter(torch.amp.is_autocast_available, _DEVICES))


def outlook_attention(
    value: Float[Tensor, "*B H W N D"],
    logits: Float[Tensor, "*B h w N KK KK"],
    *,
    kernel_size: IntOrPair = 3,
    stride: IntOrPair = 1,
    padding: IntOrPair = 1,
    dropout_mask: Float[Tensor, "*B h w N KK KK"] | None = None,
    implementation: ImplementationRequest = None,
) -> Float[Tensor, "*B H W N D"]:
    """Outlook attention: fold(softmax(logits) @ unfold(value)). VOLO, section 3.1, equations 2 to 4.

    Args:
        value: (*B, H, W, N, D), the projected values; *B any batch axes or none, H*W map, N heads, D channels per head.
        logits: (*B, h, w, N, K*K, K*K), already scaled, h = ceil(H/S), w = ceil(W/S). Of the last two axes the first
            is the output place in the window, the second the input place, over which the softmax runs.
        kernel_size: K, in pixels, an int or (rows, columns).
        stride: S, in pixels, likewise.
        padding: P, in pixels, likewise. Places outside the map read as zero, and what falls there is dropped.
        dropout_mask: multiplies the probabilities, shape of `logits`: 0, or 1/(1-rate).
        implementation: None for the fastest that can run here, a name, or a sequence of names to try in order.

    Returns:
        (*B, H, W, N, D) in the dtype of `value`. Softmax and sums run in float32 at least, the probabilities are
        rounded to the dtype of `value` in between. Autocast does not change this.

    Raises:
        TypeError: an operand is not float16, bfloat16, float32 or float64.
        ValueError: shapes do not fit each other, a size is not positive, the window grid does not fit the map, or
            `implementation` is unknown.
        NotImplementedError: the implementation asked for cannot run here (an ExceptionGroup of them for several).
    """
    if is_symbolic(value):
        grid = _unchecked_grid(value, kernel_size, stride, padding)
        return choose(implementation, IMPLEMENTATIONS, value, logits, dropout_mask, grid)(
            value, logits, dropout_mask, grid
        )
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
    run = choose(implementation, IMPLEMENTATIONS, value, logits, dropout_mask, grid)
    device_type = value.device.type
    if device_type in _AUTOCAST and torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            return unmerged(run(value, logits, dropout_mask, grid), shape)
    return unmerged(run(value, logits, dropout_mask, grid), shape)


def _unchecked_grid(value: Tensor, kernel_size: IntOrPair, stride: IntOrPair, padding: IntOrPair) -> WindowGrid:
    """Return the windows on a map whose size torch.fx records."""
    return WindowGrid(
        map_size=(value.shape[1], value.shape[2]),
        kernel_size=to_pair("kernel_size", kernel_size, minimum=1),
        stride=to_pair("stride", stride, minimum=1),
        padding=to_pair("padding", padding, minimum=0),
    )


def _dtype_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
