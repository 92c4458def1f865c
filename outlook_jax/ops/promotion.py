"""Dtypes and ranks, written out: for `jax_numpy_dtype_promotion="strict"` and `jax_numpy_rank_promotion="raise"`."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike


def at_least_float32(*operands: Array | DTypeLike) -> np.dtype[Any]:
    """Return the dtype that softmax and sums of such arrays or dtypes run in: float64 if one is, else float32."""
    return jnp.dtype(jnp.float64 if jnp.float64 in map(jnp.result_type, operands) else jnp.float32)


def along_last_axis(x: Array, rank: int) -> Array:
    """Return one number per channel as an array of this rank, channels last."""
    return x.reshape((1,) * (rank - 1) + (-1,))
