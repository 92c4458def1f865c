"""Shapes and dtypes of what the kernels take and give."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Shaped = Any  # an array, what has a shape and a dtype alone, or None where an operand may be missing


def out_shape(like: Array) -> Any:
    """Return shape and dtype of an output like `like`, varying over the same axes of a `jax.shard_map`."""
    varying = jax.typeof(like).manual_axis_type
    return jax.ShapeDtypeStruct(like.shape, like.dtype, manual_axis_type=varying)  # type: ignore[no-untyped-call]


def sums_dtype(value: Shaped, logits: Shaped) -> np.dtype[Any]:
    """Return the dtype that a kernel computes in."""
    return jnp.promote_types(jnp.promote_types(value.dtype, logits.dtype), jnp.float32)
