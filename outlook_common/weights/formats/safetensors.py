"""`.safetensors`: eight bytes with the length of a JSON header, the header, the numbers.

Read and written here rather than by the library of that name, which holds all numbers in memory at once; whatever it
refuses is refused here too, which the tests hold against it.
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
    Places,
    Tensors,
    check_names,
    check_shape,
    provisional,
    reading,
    settled,
)
from outlook_common.weights.io import limits
from outlook_common.weights.io.byte_range import ByteRange, KnownFile
from outlook_common.weights.io.lazy import Computed, InFile, LazyTensor
from outlook_common.weights.io.prefetch import each_ahead
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
    """Return the tensors of a file; its header alone is read."""
    file = KnownFile.look(path)
    with reading(path, ".safetensors"):
        header, start = _header(file)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ is not a mapping of strings")
        check_names(path, list(header))
        strange = {printable(name): printable(spec.get("dtype")) for name, spec in header.items() if _strange(spec)}
        if strange:
            raise WeightsError(f"{path}: unknown dtypes {strange}; known: {', '.join(_NAMES)}")
        byte_ranges = {name: _offsets(name, spec) for name, spec in header.items()}
        _check_gapless(byte_ranges, file.size - start)
    return Contents({name: _tensor(file, name, spec, start) for name, spec in header.items()}, metadata)


def _header(file: KnownFile) -> tuple[dict[str, Any], int]:
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
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"{printable(twice)} is there twice in its header")
    return found


def _strange(spec: Any) -> bool:
    if not isinstance(spec, dict) or spec.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("a tensor is not described by dtype, shape and data_offsets alone")
    return not isinstance(spec["dtype"], str) or spec["dtype"] not in _NAMES


def _offsets(name: str, spec: dict[str, Any]) -> tuple[int, int]:
    offsets = spec["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(place) is int for place in offsets):
        raise ValueError(f"{printable(name)} has data_offsets {printable(str(offsets)[:80])}, expected two integers")
    return offsets[0], offsets[1]


def _check_gapless(byte_ranges: dict[str, tuple[int, int]], size: int) -> None:
    """Raise a ValueError unless the byte_ranges fill the file one behind the other."""
    at = 0
    for name, (start, end) in sorted(byte_ranges.items(), key=lambda item: item[1]):
        if start != at or end < start:
            raise ValueError(f"{printable(name)} lies at bytes {start} to {end}, expected it to begin at {at}")
        at = end
    if at != size:
        raise ValueError(f"its tensors are {at} bytes long, {size} are there")


def _tensor(file: KnownFile, name: str, spec: dict[str, Any], start: int) -> LazyTensor:
    dtype, shape = DTYPES[_NAMES[spec["dtype"]]], check_shape(file.path, name, spec["shape"])
    offset, end = spec["data_offsets"]
    if (expected := prod(shape) * dtype.itemsize) != end - offset:
        raise WeightsError(
            f"{file.path}: {printable(name)} is {end - offset} bytes long, {dtype} of shape {shape} would be {expected}"
        )
    little = dtype.newbyteorder("<")
    found = InFile(little, shape, ByteRange(file, start + offset, end - offset))
    return found if little == dtype else Computed(found, dtype, shape, lambda array: array.astype(dtype))


def write(path: Path, tensors: Tensors, metadata: Metadata) -> Places:
    """Fill a file; the header comes last, so that until then it is no checkpoint."""
    length = len(_described(tensors, provisional(metadata)))
    places: dict[str, tuple[Path, int]] = {}
    with VerifiedFile(path) as file:
        file.seek(_LENGTH_BYTES + length)
        for name, _, blocks in each_ahead(tensors):
            places[name] = path, file.tell()
            for block in blocks:
                file.write(block)
        header = _described(tensors, settled(metadata))
        assert len(header) == length, (len(header), length)
        file.seek(0)
        file.write(length.to_bytes(_LENGTH_BYTES, "little") + header)
    return places


def _described(tensors: Tensors, metadata: dict[str, str]) -> bytes:
    specs: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        if name == "__metadata__":
            raise WeightsError("a tensor cannot be called __metadata__ in .safetensors")
        start, end = end, end + tensor.nbytes
        specs[name] = {"dtype": _CODES[tensor.dtype.name], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(specs, separators=(",", ":")).encode()
    return header.ljust(-(-len(header) // _ALIGNED) * _ALIGNED)


FORMAT = Format("safetensors", read, write, checks_itself=True)
