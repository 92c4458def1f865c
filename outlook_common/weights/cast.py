"""Cast lazy tensors to another floating-point dtype; overflow is an error."""

from collections.abc import Mapping
from functools import partial

import numpy as np

from outlook_common.arrays import DTYPES, cast, is_floating
from outlook_common.text import printable
from outlook_common.weights.errors import WeightsError
from outlook_common.weights.io.lazy import Computed, LazyTensor

FLOATS = ("float16", "bfloat16", "float32", "float64")


def cast_floats(tensors: Mapping[str, LazyTensor], dtype: str) -> dict[str, LazyTensor]:
    """Return the tensors with floating-point ones cast to `dtype`, one of `FLOATS`, when they are read.

    Reading raises a WeightsError if finite numbers become infinite.
    """
    return {name: _as(dtype, name, tensor) for name, tensor in tensors.items()}


def _as(dtype: str, name: str, tensor: LazyTensor) -> LazyTensor:
    if not is_floating(tensor) or tensor.dtype == DTYPES[dtype]:
        return tensor
    return Computed(tensor, DTYPES[dtype], tensor.shape, partial(_cast, name=name, dtype=dtype))


def _cast(array: np.ndarray, *, name: str, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        result = cast(array, dtype)
    with np.errstate(invalid="ignore"):  # comparing a signalling NaN of bfloat16 sets the flag
        overflowed = np.isinf(result) & np.isfinite(array)
        if overflowed.any():
            largest = np.abs(array[overflowed].astype(np.float64)).max()
            raise WeightsError(
                f"{printable(name)}: {np.count_nonzero(overflowed)} numbers overflow {dtype}, the largest {largest:.6g}"
            )
    return result
