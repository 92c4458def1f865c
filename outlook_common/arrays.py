"""Convert arrays of PyTorch and JAX to NumPy and back, bit for bit."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    import torch

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

DTYPES = {
    np.dtype(name).name: np.dtype(name)
    for name in ("f2", BFLOAT16, "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")
}


@dataclass(frozen=True)
class NotNumbers:
    """Placeholder for a value in a file that is not a numeric array; `dtype` is its type's name."""

    dtype: str


def to_numpy(value: Any) -> np.ndarray:
    """Convert a NumPy, PyTorch or JAX array, or a number, to a NumPy array in native byte order.

    It may share memory with `value`.

    Raises:
        TypeError: it is not numeric, or its dtype is not one of `DTYPES`; the message says what it is.
    """
    if isinstance(value, NotNumbers):
        raise TypeError(f"{value.dtype} is not an array of numbers")
    if hasattr(value, "detach"):
        value = _from_tensor(value)
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{type(value).__name__} is not an array: {error}") from error
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype not in DTYPES.values():
        what = f"an array of {array.dtype}" if isinstance(value, np.ndarray) else f"{type(value).__name__}"
        raise TypeError(f"{what}, not one of {', '.join(DTYPES)}")
    return array


@runtime_checkable
class HasDtype(Protocol):
    """An array, lazy or not."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of its numbers."""


def is_floating(array: HasDtype) -> bool:
    """Whether `array` holds floating-point numbers, bfloat16 included."""
    return array.dtype == BFLOAT16 or array.dtype.kind == "f"


def is_number(dtype: np.dtype[Any]) -> bool:
    """Whether a dtype is one of `DTYPES`."""
    return dtype in DTYPES.values()


def contiguous(array: np.ndarray) -> np.ndarray:
    """Return a row-major copy that owns its memory; unlike with `np.ascontiguousarray`, scalars stay scalars."""
    return np.array(array, order="C", copy=True)


def cast(array: np.ndarray, dtype: str) -> np.ndarray:
    """Cast `array` to one of `DTYPES`; not copied if it has that dtype. NumPy warns on overflow.

    Float64 is cast to 16 bits via float32, as in PyTorch and JAX: one number in 20,000 would differ in the last bit.
    """
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes quiet, which needs no warning
        if array.dtype == np.float64 and dtype in ("float16", "bfloat16"):
            array = array.astype(np.float32)
        return array.astype(DTYPES[dtype], copy=False)


def to_tensor(array: np.ndarray) -> "torch.Tensor":
    """Return a copy of `array` as a PyTorch tensor of the same dtype on the CPU."""
    import torch

    array = contiguous(array)
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _from_tensor(tensor: Any) -> np.ndarray:
    import torch  # imported already by the owner of the tensor

    if hasattr(tensor, "full_tensor"):  # a parameter under FSDP or tensor parallelism
        raise TypeError(
            "a DTensor, of which this process has a part: call get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True)) of torch.distributed.checkpoint.state_dict on every "
            "process, and pass the full tensors it returns"
        )

    try:
        tensor = tensor.detach().cpu()
        if tensor.dtype == torch.bfloat16:
            return tensor.contiguous().view(torch.int16).numpy().view(BFLOAT16)
        return tensor.numpy()
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise TypeError(f"a tensor of {tensor.dtype} on {tensor.device} has no NumPy form: {error}") from error
