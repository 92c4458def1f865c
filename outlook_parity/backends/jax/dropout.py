"""What a JAX model drops, decided by masks that both twins share."""

from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
from flax import nnx

from outlook_jax.blocks import DropPath
from outlook_parity.core.dropout import Draws


def never_drops(module: Any) -> bool:
    """Whether this is NNX's dropout at the rate 0."""
    return isinstance(module, nnx.Dropout) and module.rate == 0


def drops_by_itself(module: Any) -> bool:
    """Whether a module of NNX or Linen drops at random without asking a dropout module."""
    attention = isinstance(module, nnx.MultiHeadAttention | linen.MultiHeadDotProductAttention)
    return attention and module.dropout_rate > 0


def dropped(module: Any, draws: Draws, path: str, x: jax.Array, **kwargs: Any) -> jax.Array:
    """Return what NNX's dropout, or stochastic depth, makes of `x`, decided by `draws`."""
    asked = kwargs.get("deterministic")
    if module.deterministic if asked is None else asked:
        return x
    if isinstance(module, DropPath):
        keep = 1 - module.rate[...]
        kept = draws.uniform((x.shape[0],) + (1,) * (x.ndim - 1), path) < keep
        return x * (kept / jnp.where(keep > 0, keep, 1)).astype(x.dtype)
    if module.rate == 0:
        return x
    return _multiplied(module, draws, path, x)


def dropped_in_linen(
    module: linen.Dropout, draws: Draws, path: str, x: jax.Array, *rest: Any, **kwargs: Any
) -> jax.Array:
    """Return what Linen's dropout makes of `x`, decided by `draws`."""
    asked = kwargs.get("deterministic", rest[0] if rest else None)
    if (module.deterministic if asked is None else asked) or not module.rate:
        return x
    return _multiplied(module, draws, path, x)


def _multiplied(module: Any, draws: Draws, path: str, x: jax.Array) -> jax.Array:
    """Drop what a dropout module of NNX or Linen does: together what lies along its `broadcast_dims`."""
    together = {axis % x.ndim for axis in module.broadcast_dims}
    shape = tuple(1 if axis in together else size for axis, size in enumerate(x.shape))
    return x * jnp.asarray(draws.mask(shape, module.rate, path), x.dtype)
