"""`.safetensors`: eight bytes with the length of a JSON header, the header, the numbers.

Not read by the library's `safe_open(..., backend="pread")`, as of 0.8:

- a name that comes twice in the header is dropped silently, the last one wins;
- headers may have 100 MB and any number of names: one of 57 MB with 900,000 names took 19 s and 730 MB to open, and is
  refused unread here;
- it does not tell where a tensor begins, which verifying a file as it is written needs, so as not to read it twice;
- a file that is written to while it is read goes unnoticed;
- on 192 MB, tensor by tensor, it took 0.2 s and 23 MB; blocks of 1 MB take 0.05 s and 2 MB here.

Everything that the library refuses is refused here too, which the tests compare.
"""

import json
from math import prod
from pathlib import Path
from typing import Any

from outlook_common.arrays import DTYPES
from outlook_common.text import printable
from outlook_common.weights.errors import WeightsError
from outlook_common.weights.formats.base import (
    Contents,
    Format,
    Metadata,
    Positions,
    Tensors,
    awaited,
    check_names,
    check_shape,
    damage_errors,
    with_placeholders,
)
from outlook_common.weights.io import limits
from outlook_common.weights.io.byte_range import ByteRange, UnchangedFile
from outlook_common.weights.io.lazy import Computed, InFile, LazyTensor
from outlook_common.weights.io.prefetch import prefetch_tensors
from outlook_common.weights.io.verified import VerifiedFile

_LENGTH_BYTES, _ALIGNED = 8, 8

_NAMES = {
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    **{
        f"{letter}{bits}": f"{kind}{bits}" for letter, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
    },
    "BOOL": "bool",
}
_CODES = {name: code for code, name in _NAMES.items()}


def read(path: Path) -> Contents:
    """Open a file; only its header is read."""
    file = UnchangedFile.at(path)
    with damage_errors(path, ".safetensors"):
        header, start = _header(file)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ is not a mapping of strings")
        check_names(path, list(header))
        unknown = {
            printable(name): printable(spec.get("dtype")) for name, spec in header.items() if not _has_dtype(spec)
        }
        if unknown:
            raise WeightsError(f"{path}: unknown dtypes {unknown}; known: {', '.join(_NAMES)}")
        byte_ranges = {name: _offsets(name, spec) for name, spec in header.items()}
        _check_gapless(byte_ranges, file.size - start)
    return Contents({name: _tensor(file, name, spec, start) for name, spec in header.items()}, metadata)


def _header(file: UnchangedFile) -> tuple[dict[str, Any], int]:
    with file.open() as opened:
        length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
        if file.size < _LENGTH_BYTES or length > file.size - _LENGTH_BYTES:
            raise ValueError(f"its header would be {length} bytes long, the file is {file.size}")
        if length > limits.HEADER_BYTES:
            raise ValueError(f"its header is {length} bytes long, at most {limits.HEADER_BYTES} are read")
        text = opened.read(length)
    if not text.startswith(b"{"):
        raise ValueError("its header does not begin with {")
    found = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    return found, _LENGTH_BYTES + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"{printable(duplicate)} is there twice in its header")
    return found


def _has_dtype(spec: Any) -> bool:
    if not isinstance(spec, dict) or spec.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("a tensor is not described by dtype, shape and data_offsets alone")
    return isinstance(spec["dtype"], str) and spec["dtype"] in _NAMES


def _offsets(name: str, spec: dict[str, Any]) -> tuple[int, int]:
    offsets = spec["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
        raise ValueError(
            f"{printable(name)} has the data_offsets {printable(str(offsets)[:80])}, expected two integers"
        )
    return offsets[0], offsets[1]


def _check_gapless(byte_ranges: dict[str, tuple[int, int]], size: int) -> None:
    """Raise a ValueError unless the byte ranges fill the file without gaps or overlaps."""
    at = 0
    for name, (start, end) in sorted(byte_ranges.items(), key=lambda item: item[1]):
        if start != at or end < start:
            raise ValueError(f"{printable(name)} lies at bytes {start} to {end}, expected it to begin at {at}")
        at = end
    if at != size:
        raise ValueError(f"its tensors are {at} bytes long, {size} are there")


def _tensor(file: UnchangedFile, name: str, spec: dict[str, Any], start: int) -> LazyTensor:
    dtype, shape = DTYPES[_NAMES[spec["dtype"]]], check_shape(file.path, name, spec["shape"])
    offset, end = spec["data_offsets"]
    if (expected := prod(shape) * dtype.itemsize) != end - offset:
        raise WeightsError(
            f"{file.path}: {printable(name)} is {end - offset} bytes long, {dtype} of shape {shape} would be {expected}"
        )
    little = dtype.newbyteorder("<")
    found = InFile(little, shape, ByteRange(file, start + offset, end - offset))
    return found if little == dtype else Computed(found, dtype, shape, lambda array: array.astype(dtype))


def write(path: Path, tensors: Tensors, metadata: Metadata) -> Positions:
    """Fill a file; the header is written last, so that until then it is not a checkpoint."""
    length = len(_header_of(tensors, with_placeholders(metadata)))
    positions: dict[str, tuple[Path, int]] = {}
    with VerifiedFile(path) as file:
        file.seek(_LENGTH_BYTES + length)
        for name, _, blocks in prefetch_tensors(tensors):
            positions[name] = path, file.tell()
            for block in blocks:
                file.write(block)
        header = _header_of(tensors, awaited(metadata))
        assert len(header) == length, (len(header), length)
        file.seek(0)
        file.write(length.to_bytes(_LENGTH_BYTES, "little") + header)
    return positions


def _header_of(tensors: Tensors, metadata: dict[str, str]) -> bytes:
    specs: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        if name == "__metadata__":
            raise WeightsError("a tensor cannot be called __metadata__ in .safetensors")
        start, end = end, end + tensor.nbytes
        specs[name] = {"dtype": _CODES[tensor.dtype.name], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(specs, separators=(",", ":")).encode()
    return header.ljust(-(-len(header) // _ALIGNED) * _ALIGNED)


FORMAT = Format("safetensors", read, write, verifies_itself=True)
