"""Stubs for harmless objects in PyTorch's pickles that training scripts save beside weights.

Each replaces a class or function named by a pickle, so that the original never sees the file's contents.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

# NumPy's pickled names of numeric dtypes; no objects (pickles again), records, strings or times.
_CODES = {f"{kind}{size}" for kind, sizes in {"f": "248", "i": "1248", "u": "1248", "b": "1"}.items() for size in sizes}
_ORDERS = ("<", ">", "=", "|")
_NO_NUMBER = "it has a NumPy scalar that is not a number; convert it with .item() before saving"

SCALARS = tuple(np.dtype(code).type for code in sorted(_CODES))


class Namespace:
    """Stub of `argparse.Namespace`, in which timm's `train.py` saves its arguments.

    It drops all attributes: with them it could pass for an array anywhere in memory.
    """

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Drop the attributes."""


class Dtype:
    """Stub of `numpy.dtype`, for numbers."""

    __slots__ = ("_code", "_order")

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or code not in _CODES:
            raise TypeError(_NO_NUMBER)
        self._code, self._order = code, "="

    def __setstate__(self, state: Any) -> None:
        """Take the byte order; the rest of a dtype's state is for records."""
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in _ORDERS:
            raise TypeError("it has a NumPy scalar of unknown byte order")
        self._order = state[1]

    def number(self, data: bytes) -> Any:
        """Return the number with these bytes.

        Raises:
            TypeError: they are not as many as the dtype has.
        """
        dtype = np.dtype(f"{self._order}{self._code}")
        if len(data) != dtype.itemsize:
            raise TypeError(f"it has a NumPy scalar of {len(data)} bytes, {dtype} takes {dtype.itemsize}")
        return np.frombuffer(data, dtype)[0]


def scalar(dtype: Any, data: Any) -> Any:
    """Stub of `numpy._core.multiarray.scalar`, for numbers.

    Raises:
        TypeError: it is not a number.
    """
    if not isinstance(dtype, Dtype) or not isinstance(data, bytes):
        raise TypeError(_NO_NUMBER)
    return dtype.number(data)


# Name in pickles -> stub.
PICKLE_STUBS: dict[str, Callable[..., Any]] = {
    "argparse.Namespace": Namespace,
    "numpy.dtype": Dtype,
    "numpy.core.multiarray.scalar": scalar,
    "numpy._core.multiarray.scalar": scalar,
}
