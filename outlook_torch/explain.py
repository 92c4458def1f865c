"""Look inside a model: the attention weights of its blocks."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from outlook_common.explain import NO_ATTENTION
from outlook_torch.attention import OutlookAttention
from outlook_torch.blocks import Attention, ClassAttention

KINDS = (OutlookAttention, Attention, ClassAttention)


def attention_maps(model: nn.Module, images: Float[Tensor, "..."]) -> dict[str, Float[Tensor, "..."]]:
    """Return the attention weights of every block, as in evaluation.

    Each layer computes them from its own input by its own projection, whichever `implementation` it runs. They are in
    float32 at least, their last axis sums to one, and they can be differentiated.

    | layer | shape | weights |
    |---|---|---|
    | outlook attention | (B, h, w, N, K*K, K*K) | per window: of each of its places (last axis) in each of its places |
    | self-attention | (B, N, T, T) | of each position (last axis) in each position; T = H*W, row by row |
    | class attention | (B, N, 1, 1 + T) | of each token (last axis), the class token first, in the class token |

    Places of a window outside the map have weights too; the values there are zero.

    Args:
        model: a `VOLO`, one of its blocks or layers, or a model that contains such. It stays as it is: its mode, its
            statistics, its random streams.
        images: its input.

    Returns:
        Weights by the path of the layer, in the order of their computation: "network.0.0.attn", "post_network.0.attn";
        "" for a layer alone. B batch, h*w windows, N heads, K*K places of a window.

    Raises:
        ValueError: there is no attention layer of this package in the model; or as the model itself.
    """
    named = {path.replace("_orig_mod.", ""): module for path, module in model.named_modules()}  # torch.compile's prefix
    layers = {path: module for path, module in named.items() if isinstance(module, KINDS)}
    if not layers:
        raise ValueError(NO_ATTENTION.format(type(model).__name__))
    maps: dict[str, Tensor] = {}

    def record(path: str) -> Any:
        def hook(layer: Any, args: tuple[Any, ...]) -> None:
            maps[path] = layer.attention_weights(args[0])

        return hook

    modes = {module: module.training for module in model.modules()}
    hooks = [layer.register_forward_pre_hook(record(path)) for path, layer in layers.items()]
    try:
        with torch.compiler.set_stance("force_eager"):  # a compiled program knows nothing of new hooks
            model.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    return maps
