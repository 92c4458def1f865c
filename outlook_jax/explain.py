"""Look inside a model: the attention weights of its blocks."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from outlook_common.explain import NO_ATTENTION
from outlook_jax.attention import OutlookAttention
from outlook_jax.blocks import Attention, ClassAttention
from outlook_jax.weights import path_name

KINDS = (OutlookAttention, Attention, ClassAttention)


def attention_maps(model: nnx.Module, images: Float[Array, "..."]) -> dict[str, Float[Array, "..."]]:
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
    watched: dict[str, _Watched] = {}

    def watch(path: Any, node: Any) -> Any:
        if isinstance(node, KINDS):
            node = watched[path_name(path)] = _Watched(node)
        return node

    evaluated = nnx.view(model, raise_if_not_found=False, deterministic=True, use_running_average=True)
    evaluated = nnx.recursive_map(watch, evaluated)
    if not watched:
        raise ValueError(NO_ATTENTION.format(type(model).__name__))
    evaluated(images)
    return {path: layer.weights.get_value() for path, layer in watched.items()}


class _Watched(nnx.Module):
    """A layer that keeps the weights of its last call, in a variable so that no transformation loses them."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.weights = nnx.Intermediate(jnp.zeros(()))

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        self.weights.set_value(self.layer.attention_weights(x))
        return self.layer(x, *args, **kwargs)
