"""Shapes and dtypes of what the kernels take and give."""

from typing import Any

import jax
import numpy as np
from jax import Array

from outlook_jax.ops.promotion import at_least_float32

Shaped = Any  # an array, what has a shape and a dtype alone, or None where an operand may be missing


def out_shape(like: Array) -> Any:
    """Return shape and dtype of an output like `like`, varying over the same axes of a `jax.shard_map`."""
    varying = jax.typeof(like).manual_axis_type
    return jax.ShapeDtypeStruct(like.shape, like.dtype, manual_axis_type=varying)  # type: ignore[no-untyped-call]


def sums_dtype(value: Shaped, logits: Shaped) -> np.dtype[Any]:
    """Return the dtype that a kernel computes in."""
    return at_least_float32(value.dtype, logits.dtype)
