"""Precisions: the dtype of storage, and the rounding of products. Imports no framework.

All but TF32 are dtypes. TF32 is float32 whose matrix products and convolutions may round what they multiply to 10
explicit bits, and add up in float32: a mode of some GPUs, which no dtype shows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np

# How products of float32 are computed: in full, or from numbers rounded to TF32.
Products = Literal["full", "tf32"]


@dataclass(frozen=True)
class Precision:
    """One precision.

    Attributes:
        storage: the dtype of inputs, weights and results.
        bits: explicit mantissa bits of the factors of products.
        sum_bits: explicit mantissa bits of other sums.
        products: how products of float32 are computed.
    """

    storage: np.dtype
    bits: int
    sum_bits: int
    products: Products

    @property
    def epsilon(self) -> float:
        """The unit of rounding: the distance from 1 to the next number."""
        return 2.0**-self.bits

    @property
    def sum_epsilon(self) -> float:
        """The unit of rounding of sums."""
        return 2.0**-self.sum_bits


def _dtype(dtype: np.dtype) -> Precision:
    bits = int(ml_dtypes.finfo(dtype).nmant)  # type: ignore[no-untyped-call]
    return Precision(dtype, bits, bits, "full")


PRECISIONS: dict[str, Precision] = {
    "float64": _dtype(np.dtype(np.float64)),
    "float32": _dtype(np.dtype(np.float32)),
    "tf32": Precision(np.dtype(np.float32), bits=10, sum_bits=23, products="tf32"),
    "bfloat16": _dtype(np.dtype(ml_dtypes.bfloat16)),
    "float16": _dtype(np.dtype(np.float16)),
}

# The precision of the truth, which is computed on the CPU.
TRUTH = "float64"

# The dtypes of storage.
STORAGES = tuple(dict.fromkeys(precision.storage for precision in PRECISIONS.values()))

*_FIRST, _LAST = PRECISIONS
IN_WORDS = f"{', '.join(_FIRST)} or {_LAST}"  # for help texts

# A matrix product of rounded numbers has an RMS error of about 0.3 units of their rounding, whatever its length. A
# smaller error than the first of these comes from finer numbers, a larger one than the second from coarser ones.
LEAST_SHOWN, MOST_SHOWN = 1 / 32, 1.0


def absence_of_products(where: str, name: str, multiply: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> str | None:
    """Return why products in this precision cannot be had, or None if they can, by computing one.

    Args:
        where: in words, for the reason.
        name: the precision; those that are dtypes can always be had.
        multiply: computes a matrix product there.
    """
    precision = PRECISIONS[name]
    if precision.products == "full":
        return None
    one, other = np.random.default_rng(0).standard_normal((2, 256, 256), np.float32)
    truth = one.astype(np.float64) @ other.astype(np.float64)
    error = float(np.linalg.norm(multiply(one, other) - truth) / np.linalg.norm(truth)) / precision.epsilon
    if LEAST_SHOWN <= error <= MOST_SHOWN:
        return None
    return f"{where} has no {name}: a product errs by {error:.1g} units of its rounding, not by about 0.3"
