"""Anybody's arrays as NumPy's and back, bit for bit."""

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
    """Stands for something in a file that is no array of numbers; `dtype` says what it is."""

    dtype: str


def to_numpy(value: Any) -> np.ndarray:
    """Return a NumPy, PyTorch or JAX array, or a number, as a NumPy array in this machine's byte order.

    It may share its memory with `value`.

    Raises:
        TypeError: it is not made of numbers, or its dtype is not one of `DTYPES`; the message says what it is.
    """
    if isinstance(value, NotNumbers):
        raise TypeError(f"{value.dtype} is no array of numbers")
    if hasattr(value, "detach"):
        value = _from_tensor(value)
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{type(value).__name__} is no array: {error}") from error
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype not in DTYPES.values():
        what = f"an array of {array.dtype}" if isinstance(value, np.ndarray) else f"{type(value).__name__}"
        raise TypeError(f"{what}, not one of {', '.join(DTYPES)}")
    return array


@runtime_checkable
class HasDtype(Protocol):
    """An array, or what will be one."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of its numbers."""


def is_floating(array: HasDtype) -> bool:
    """Whether `array` holds floating-point numbers, bfloat16 included."""
    return array.dtype == BFLOAT16 or array.dtype.kind == "f"


def is_number(dtype: np.dtype[Any]) -> bool:
    """Whether a dtype is one of `DTYPES`."""
    return dtype in DTYPES.values()


def contiguous(array: np.ndarray) -> np.ndarray:
    """Return a copy in row-major order that owns its memory; unlike `np.ascontiguousarray`, scalars stay scalars."""
    return np.array(array, order="C", copy=True)


def cast(array: np.ndarray, dtype: str) -> np.ndarray:
    """Return `array` in one of `DTYPES`, itself if it has that one already; NumPy warns of overflow.

    Float64 goes to 16 bits by way of float32, as PyTorch and JAX cast it: rounding once would differ in the last bit
    for one number in 20,000.
    """
    with np.errstate(invalid="ignore"):  # a signalling NaN stays a NaN, that is no loss to warn of
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
    import torch  # whoever made the tensor has imported it already

    if hasattr(tensor, "full_tensor"):  # what FSDP and tensor parallelism make of parameters
        raise TypeError(
            "a DTensor, of which this process has a part: on every process, get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True)) of torch.distributed.checkpoint.state_dict gives whole "
            "tensors, which load_weights and write_arrays take"
        )

    try:
        tensor = tensor.detach().cpu()
        if tensor.dtype == torch.bfloat16:
            return tensor.contiguous().view(torch.int16).numpy().view(BFLOAT16)
        return tensor.numpy()
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise TypeError(f"a tensor of {tensor.dtype} on {tensor.device} has no NumPy form: {error}") from error
