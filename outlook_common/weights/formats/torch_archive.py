"""One tensor as `torch.save` writes it, in a part of a file; its numbers are read later, without PyTorch."""

import struct
from dataclasses import replace
from typing import Any

import numpy as np

from outlook_common.arrays import DTYPES
from outlook_common.text import printable
from outlook_common.weights.formats.base import check_shape
from outlook_common.weights.formats.restricted_pickle import Constant, load, record
from outlook_common.weights.formats.zip_members import members
from outlook_common.weights.io import limits
from outlook_common.weights.io.byte_range import ByteRange, UnchangedFile
from outlook_common.weights.io.lazy import Computed, InFile, LazyTensor

# Storage classes of PyTorch -> dtype.
_STORAGES = {
    "Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16", "Byte": "uint8", "Char": "int8",
    "Short": "int16", "Int": "int32", "Long": "int64", "Bool": "bool",
}  # fmt: skip
_TENSOR = record("a tensor")
# Of dtypes without a storage class; the dtype is the seventh argument.
_TENSOR_OF_BYTES = record("a tensor of bytes")
_STUBS: dict[str, Any] = {
    "torch._utils._rebuild_tensor_v2": _TENSOR,
    "torch._utils._rebuild_tensor_v3": _TENSOR_OF_BYTES,
    "collections.OrderedDict": record("OrderedDict"),  # of hooks
    **{f"torch.{name}Storage": Constant(DTYPES[dtype]) for name, dtype in _STORAGES.items()},
    **{f"torch.{name}": Constant(dtype) for name, dtype in DTYPES.items()},
    "torch.storage.UntypedStorage": Constant(None),
}
# The end of an archive: magic, two numbers of disks, two counts of members, size and position of their list, comment.
# Before it the same in 64 bits, behind its own length and two versions, and where that lies.
_END, _LONG_END, _LOCATOR = struct.Struct("<4s4H2IH"), struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI")
# An entry in the list of members; of its parts the lengths of what follows: name, extra field, comment.
_ENTRY = struct.Struct("<28x3H12x")
# Bytes of the pickle of one tensor, which has some 200.
_PICKLE_BYTES = 1 << 16


def open_tensor(file: UnchangedFile, start: int, size: int) -> LazyTensor:
    """Return the tensor of the archive that lies at these bytes of a file.

    Raises:
        ValueError, TypeError: it holds something else, or a tensor larger than its storage.
        WeightsError: its pickle names code.
    """
    inside = {name.partition("/")[2]: member for name, member in members(file, start, size).items()}
    _check_end(file, start, size, len(inside))
    if any(byte_range.deflated for byte_range, _ in inside.values()):
        raise ValueError("a tensor is compressed; PyTorch never compresses")
    if "byteorder" in inside and (order := _contents(inside, "byteorder")) != b"little":
        raise ValueError(f"its numbers are in the byte order {order!r}, expected little")
    found = load(_contents(inside, "data.pkl"), _STUBS, _storage)
    if not isinstance(found, _TENSOR | _TENSOR_OF_BYTES) or len(found.arguments) < 6:
        raise TypeError("an archive does not hold a tensor")
    storage, first, sizes, strides = found.arguments[:4]
    if not isinstance(storage, _Storage):
        raise TypeError("a tensor has no storage")
    own = found.arguments[6] if isinstance(found, _TENSOR_OF_BYTES) and len(found.arguments) > 6 else None
    dtype = storage.dtype if own is None else getattr(own, "value", None)
    if not isinstance(dtype, np.dtype):
        raise TypeError("a tensor is of a dtype that is not read")
    shape, steps = check_shape(file.path, "a tensor", sizes), check_shape(file.path, "the strides of a tensor", strides)
    byte_range, length = inside.get(f"data/{storage.key}", (None, 0))
    if byte_range is None:
        raise ValueError(f"there is no storage data/{printable(storage.key)}")
    byte_range = replace(byte_range, crc=byte_range.crc or None)  # 0 by set_crc32_options(False)
    return _view(dtype, shape, steps, first, byte_range, length)


def _check_end(file: UnchangedFile, start: int, size: int, count: int) -> None:
    """Raise a ValueError unless an archive ends as PyTorch's do: in one part, without a comment, all said alike twice.

    Python's module reads past contradictions that PyTorch refuses.
    """
    whole = _LONG_END.size + _LOCATOR.size + _END.size
    if size < whole:
        raise ValueError(f"an archive has {size} bytes, less than its end alone, {whole}")
    with file.open() as opened:
        opened.seek(start + size - whole)
        end = opened.read(whole)
    magic, disk, first_disk, here, members_in_all, length, position, comment = _END.unpack(end[-_END.size :])
    long_magic, _, _, _, *long_end = _LONG_END.unpack(end[: _LONG_END.size])
    locator = _LOCATOR.unpack(end[_LONG_END.size : -_END.size])
    said = [disk, first_disk, here, members_in_all, length, position]
    magics = magic == b"PK\5\6" and long_magic == b"PK\6\6" and locator == (b"PK\6\7", 0, size - whole, 1)
    if not magics or said != long_end or said[:4] != [0, 0, count, count] or comment:
        raise ValueError(f"an archive does not end at byte {start + size} as PyTorch's do, with {count} members")
    if position + length != size - whole or length > limits.HEADER_BYTES:
        raise ValueError(f"the list of an archive's members does not end at byte {start + size - whole}")
    with file.open() as opened:
        opened.seek(start + position)
        listed = opened.read(length)
    at = 0
    for _ in range(count):
        if len(entry := listed[at : at + _ENTRY.size]) < _ENTRY.size:
            break
        at += _ENTRY.size + sum(_ENTRY.unpack(entry))
    if at != length:
        raise ValueError(f"the list of an archive's members has {length} bytes, {at} by the lengths in it")


class _Storage:
    """A storage: its dtype, None for bytes, and the name of its record."""

    def __init__(self, dtype: np.dtype[Any] | None, key: str) -> None:
        self.dtype, self.key = dtype, key


def _storage(pid: Any) -> _Storage:
    is_storage = isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"
    if not is_storage or not isinstance(pid[1], Constant) or not isinstance(pid[2], str):
        raise TypeError("it refers to something that is no storage")
    return _Storage(pid[1].value, pid[2])


def _contents(inside: dict[str, tuple[ByteRange, int]], name: str) -> bytes:
    if name not in inside:
        raise ValueError(f"there is no {name} in it")
    byte_range, size = inside[name]
    if size > min(_PICKLE_BYTES, limits.PICKLE_BYTES):
        raise ValueError(f"{name} has {size} bytes, at most {_PICKLE_BYTES} are read")
    found = np.empty(size, np.uint8)
    with byte_range.open() as stream:
        stream.fill(found)
        stream.finish()
    return found.tobytes()


def _view(
    dtype: np.dtype[Any], shape: tuple[int, ...], steps: tuple[int, ...], first: Any, byte_range: ByteRange, length: int
) -> LazyTensor:
    """Return the tensor with these strides, in numbers, in a storage of `length` bytes."""
    if len(steps) != len(shape) or type(first) is not int or first < 0:
        raise ValueError(f"a tensor of shape {shape} has the strides {steps} and begins at {first}")
    last = first + sum((size - 1) * step for size, step in zip(shape, steps, strict=True))
    numbers = length // dtype.itemsize
    if 0 not in shape and (last >= numbers or int(np.prod(shape, dtype=object)) > numbers):
        raise ValueError(f"a tensor of shape {shape} reaches to number {last}, its storage has {numbers}")
    little = dtype.newbyteorder("<")
    expected = int(np.prod(shape, dtype=object)) * dtype.itemsize
    is_whole = first == 0 and expected == length and steps == _row_major(shape)
    whole = InFile(little, shape if is_whole else (numbers,), byte_range)
    if is_whole:
        return whole if little == dtype else Computed(whole, dtype, shape, lambda array: array.astype(dtype))
    if length % dtype.itemsize:
        raise ValueError(f"a storage of {dtype} has {length} bytes")

    def compute(array: np.ndarray) -> np.ndarray:
        strides = tuple(step * dtype.itemsize for step in steps)
        viewed = np.lib.stride_tricks.as_strided(array[min(first, numbers) :], shape, strides, writeable=False)
        return viewed.astype(dtype)

    return Computed(whole, dtype, shape, compute)


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    steps, step = [], 1
    for size in reversed(shape):
        steps.append(step)
        step *= max(size, 1)
    return tuple(reversed(steps))
