"""The precisions that twins are verified in: what numbers are kept in, and how their products round them. No framework.

All but TF32 are dtypes. TF32 is float32 whose matrix products and convolutions may round what they multiply to 10
explicit bits, and add up in float32: a mode of some GPUs, which no dtype shows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np

# How products of float32 are computed: in full, or of numbers that are rounded to TF32.
Products = Literal["full", "tf32"]


@dataclass(frozen=True)
class Precision:
    """One precision.

    Attributes:
        storage: the dtype of inputs, weights and results.
        bits: explicit bits of the numbers that products multiply.
        sum_bits: explicit bits of sums that are no part of a product.
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

# In which the truth is computed, on the CPU.
TRUTH = "float64"

# The dtypes that numbers are kept in.
STORAGES = tuple(dict.fromkeys(precision.storage for precision in PRECISIONS.values()))

*_FIRST, _LAST = PRECISIONS
IN_WORDS = f"{', '.join(_FIRST)} or {_LAST}"  # for help texts

# A product of rounded numbers errs by about 0.3 units of their rounding in RMS, whatever it adds up. What errs by less
# than the smaller of these was computed of finer numbers, what by more than the larger of coarser ones.
LEAST_SHOWN, MOST_SHOWN = 1 / 32, 1.0


def absence_of_products(where: str, name: str, multiply: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> str | None:
    """Return why products are not of numbers of this precision there, or None if they are.

    Which devices have TF32, and which settings of theirs forbid it, no table needs to know: one product is computed.
    What a dtype alone decides is always there.
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
