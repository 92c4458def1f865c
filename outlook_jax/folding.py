"""Fold BatchNorm into the convolutions before it, for inference."""

from flax import nnx
from jax import lax

from outlook_common.volo import check_foldable
from outlook_jax.batch_norm import BatchNorm
from outlook_jax.blocks import unchanged
from outlook_jax.model import VOLO
from outlook_jax.ops.promotion import along_last_axis, at_least_float32


def fold_batch_norm(model: VOLO) -> VOLO:
    """Return a copy for inference with the stem's BatchNorm folded into its convolutions.

    Logits are the same to rounding: in inference BatchNorm is one factor and one summand per channel. `model` stays
    as it is; all other variables are shared with it. The copy has no weights under the released names, so it cannot be
    loaded, saved or trained: do that with `model`.

    Args:
        model: a VOLO in inference mode, `model.eval()`.

    Raises:
        TypeError: `model` is not a VOLO of this package, or is folded already.
        ValueError: `model` is in training mode.
    """
    check_foldable(model, VOLO, training=lambda: _is_training(model))
    folded = nnx.merge(*nnx.split(model))
    layers = list(folded.patch_embed.conv)
    for index, layer in enumerate(layers):
        if isinstance(layer, BatchNorm):
            layers[index - 1], layers[index] = _fused(layers[index - 1], layer), unchanged
    folded.patch_embed.conv = nnx.List(layers)
    folded.batch_norm_folded = True
    return folded


def _is_training(model: VOLO) -> bool:
    norms = [module for _, module in nnx.iter_modules(model) if isinstance(module, BatchNorm)]
    return not all(norm.use_running_average for norm in norms)


def _fused(convolution: nnx.Conv, norm: BatchNorm) -> nnx.Conv:
    """Return `convolution`, changed in place to compute norm(convolution(x)); it must have no bias."""
    kernel = convolution.kernel[...]
    dtype = kernel.dtype
    wide = at_least_float32(dtype)
    scale = lax.rsqrt(norm.var[...].astype(wide) + norm.epsilon) * norm.scale[...].astype(wide)
    bias = norm.bias[...].astype(wide) - norm.mean[...].astype(wide) * scale
    # New variables: the old ones are those of the model itself.
    convolution.kernel = nnx.Param((kernel.astype(wide) * along_last_axis(scale, kernel.ndim)).astype(dtype))
    del convolution.bias  # NNX lets no attribute change between None and an array
    convolution.bias = nnx.Param(bias.astype(dtype))
    convolution.use_bias = True
    return convolution
