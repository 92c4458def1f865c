"""Dropout of JAX modules with masks that both twins share."""

from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
from flax import nnx

from outlook_parity.core.dropout import Draws
from outlook_parity.models.jax_layers import DropPath, drop_path


def never_drops(module: Any) -> bool:
    """Whether this is NNX's dropout with rate 0."""
    return isinstance(module, nnx.Dropout) and module.rate == 0


def drops_by_itself(module: Any) -> bool:
    """Whether a module of NNX or Linen has dropout inside its own code."""
    attention = isinstance(module, nnx.MultiHeadAttention | linen.MultiHeadDotProductAttention)
    return attention and module.dropout_rate > 0


def dropped(module: Any, draws: Draws, path: str, x: jax.Array, **kwargs: Any) -> jax.Array:
    """Return the output of NNX's dropout, or of stochastic depth, with masks from `draws`."""
    deterministic = kwargs.get("deterministic")
    if module.deterministic if deterministic is None else deterministic:
        return x
    if isinstance(module, DropPath):
        return drop_path(module, draws, path, x)
    if module.rate == 0:
        return x
    return _multiplied(module, draws, path, x)


def dropped_in_linen(
    module: linen.Dropout, draws: Draws, path: str, x: jax.Array, *rest: Any, **kwargs: Any
) -> jax.Array:
    """Return the output of Linen's dropout with masks from `draws`."""
    deterministic = kwargs.get("deterministic", rest[0] if rest else None)
    if (module.deterministic if deterministic is None else deterministic) or not module.rate:
        return x
    return _multiplied(module, draws, path, x)


def _multiplied(module: Any, draws: Draws, path: str, x: jax.Array) -> jax.Array:
    """Return `x` times a mask, which is constant along the module's `broadcast_dims`."""
    broadcast = {axis % x.ndim for axis in module.broadcast_dims}
    shape = tuple(1 if axis in broadcast else size for axis, size in enumerate(x.shape))
    return x * jnp.asarray(draws.mask(shape, module.rate, path), x.dtype)
