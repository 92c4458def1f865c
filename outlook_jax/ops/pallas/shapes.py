"""Shapes and dtypes of what the kernels take and give."""

from typing import Any

import numpy as np

from outlook_jax.ops.promotion import at_least_float32

Shaped = Any  # an array, what has a shape and a dtype alone, or None where an operand may be missing


def sums_dtype(value: Shaped, logits: Shaped) -> np.dtype[Any]:
    """Return the dtype that a kernel computes in."""
    return at_least_float32(value.dtype, logits.dtype)
