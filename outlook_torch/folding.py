"""Fold BatchNorm into the convolutions before it, for inference."""

import copy

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from outlook_common.volo import check_foldable
from outlook_torch.model import VOLO


def fold_batch_norm(model: VOLO) -> VOLO:
    """Return a copy for inference with the stem's BatchNorm folded into its convolutions.

    Logits are the same to rounding: in inference BatchNorm is one factor and one summand per channel. `model` stays
    as it is; all other weights are shared with it. The copy has no weights under the released names, so it cannot be
    loaded, saved or trained: do that with `model`.

    Args:
        model: a VOLO in inference mode, `model.eval()`.

    Raises:
        TypeError: `model` is not a VOLO of this package, or is folded already.
        ValueError: `model` is in training mode.
    """
    check_foldable(model, VOLO, training=lambda: model.training)
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    folded = copy.deepcopy(model, shared)
    layers = folded.patch_embed.conv
    for index, layer in enumerate(layers):
        if isinstance(layer, nn.BatchNorm2d):
            convolution = layers[index - 1]
            assert isinstance(convolution, nn.Conv2d)
            layers[index - 1], layers[index] = fuse_conv_bn_eval(convolution, layer), nn.Identity()
    folded.batch_norm_folded = True
    return folded
