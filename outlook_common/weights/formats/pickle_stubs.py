"""What reads, in pickles of PyTorch's, the harmless things that training scripts save beside weights.

Each stands in for a class or function that a pickle names; the real one never gets to see what is in the file.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

# What NumPy's pickles call the dtypes of numbers; no objects, which are pickles again, no records, texts or times.
_CODES = {f"{kind}{size}" for kind, sizes in {"f": "248", "i": "1248", "u": "1248", "b": "1"}.items() for size in sizes}
_ORDERS = ("<", ">", "=", "|")
_NO_NUMBER = "it has a NumPy scalar that is no number; convert it with .item() before it is saved"

SCALARS = tuple(np.dtype(code).type for code in sorted(_CODES))


class Namespace:
    """An `argparse.Namespace`, in which timm's `train.py` saves its arguments.

    It is safe because it is empty: pickles make it with no arguments and then give it attributes, which it drops.
    With them it could claim to be an array that lies anywhere in memory.
    """

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Drop the arguments."""


class Dtype:
    """A `numpy.dtype` of numbers, the type of what a training script has measured."""

    __slots__ = ("_code", "_order")

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or code not in _CODES:
            raise TypeError(_NO_NUMBER)
        self._code, self._order = code, "="

    def __setstate__(self, state: Any) -> None:
        """Take the order of bytes; all else in a dtype's state is for records."""
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in _ORDERS:
            raise TypeError("it has a NumPy scalar of unknown byte order")
        self._order = state[1]

    def number(self, data: bytes) -> Any:
        """Return the number that these bytes are, in this machine's byte order.

        Raises:
            TypeError: they are of another length.
        """
        dtype = np.dtype(f"{self._order}{self._code}")
        if len(data) != dtype.itemsize:
            raise TypeError(f"it has a NumPy scalar of {len(data)} bytes, {dtype} takes {dtype.itemsize}")
        return np.frombuffer(data, dtype)[0]


def scalar(dtype: Any, data: Any) -> Any:
    """Do what `numpy._core.multiarray.scalar` does, for numbers.

    Raises:
        TypeError: there are no such numbers.
    """
    if not isinstance(dtype, Dtype) or not isinstance(data, bytes):
        raise TypeError(_NO_NUMBER)
    return dtype.number(data)


# By what pickles call them.
PICKLE_STUBS: dict[str, Callable[..., Any]] = {
    "argparse.Namespace": Namespace,
    "numpy.dtype": Dtype,
    "numpy.core.multiarray.scalar": scalar,
    "numpy._core.multiarray.scalar": scalar,
}
