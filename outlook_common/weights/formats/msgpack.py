"""Flax's `.msgpack`: nested mappings of arrays, as `flax.serialization` writes them.

Not read with the `msgpack` library, whose `Unpacker` hands over an array only once all of it is in memory, and a file
only after the last one: here the arrays are skipped, and read later, one at a time. Their layout is all of the format
that is needed.
"""

import io
import struct
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from outlook_common.arrays import DTYPES, NotNumbers
from outlook_common.text import listed, printable
from outlook_common.weights.errors import WeightsError
from outlook_common.weights.formats.base import (
    Contents,
    Format,
    Metadata,
    Positions,
    Tensors,
    check_names,
    check_shape,
    damage_errors,
)
from outlook_common.weights.io import limits
from outlook_common.weights.io.byte_range import ByteRange, UnchangedFile
from outlook_common.weights.io.lazy import InFile, LazyTensor
from outlook_common.weights.io.pieces import Joined, Piece
from outlook_common.weights.io.prefetch import prefetch_tensors
from outlook_common.weights.io.verified import VerifiedFile
from outlook_common.weights.tables.base import FLAX

# Flax's types of extensions: an array, a complex number, a NumPy scalar.
_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3
# Arrays of a gigabyte and more are split by Flax: this key, and those of its shape and parts.
_CHUNKED, _SHAPE, _CHUNKS = "__msgpack_chunked_array__", "shape", "chunks"
_CHUNK_BYTES = 1 << 30
_MOST_AXES = 32


def read(path: Path) -> Contents:
    """Open a file; everything but the arrays is read."""
    file = UnchangedFile.at(path)
    with damage_errors(path, ".msgpack"), file.open() as opened:
        reader = _Reader(file, io.BufferedReader(opened))  # type: ignore[arg-type]
        found = reader.value(0)
        if reader.at != file.size:
            raise ValueError(f"its mapping ends at byte {reader.at}, the file at {file.size}")
        if not isinstance(found, dict):
            raise TypeError(f"it holds {type(found).__name__}, expected a mapping")
    names = [name for name, _ in _flat(found)]
    check_names(path, names)
    return Contents(dict(_flat(found)))


def _flat(found: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in found.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


class _Reader:
    """Reads values one after another, and skips arrays."""

    def __init__(self, file: UnchangedFile, opened: io.BufferedReader) -> None:
        self.at = 0
        self._file = file
        self._opened = opened
        self._names = self._read = 0

    def value(self, depth: int) -> Any:
        """Return the next value: a dictionary, a tensor, a number, a string, or a placeholder."""
        if depth > limits.DEPTH:
            raise ValueError(f"mappings nest more than {limits.DEPTH} deep")
        code = self._bytes(1)[0]
        if code < 0x80:
            return code
        if code >= 0xE0:
            return code - 0x100
        if code < 0x90:
            return self.mapping(code & 0xF, depth)
        if code < 0xA0:
            return self.sequence(code & 0xF, depth)
        if code < 0xC0:
            return self.string(code & 0x1F)
        if code not in _CODES:
            raise ValueError(f"byte {self.at - 1} is {code:#x}, which begins no value")
        return _CODES[code](self, depth)

    def _bytes(self, count: int) -> bytes:
        self._read += count
        if self._read > limits.HEADER_BYTES:
            raise ValueError(f"it has more than {limits.HEADER_BYTES} bytes beside its arrays")
        found = self._opened.read(count)
        if len(found) < count:
            raise ValueError(f"it ends at byte {self._file.size}, amid a value")
        self.at += count
        return found

    def number(self, code: str) -> Any:
        """Return the next number of this type, as `struct` calls it."""
        return struct.unpack(f">{code}", self._bytes(struct.calcsize(code)))[0]

    def mapping(self, count: int, depth: int) -> Any:
        """Return the mapping of `count` names that follows, or the array that it stands for."""
        self._count(count)
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self.value(depth + 1)
            if not isinstance(key, str):
                raise ValueError(f"a name is {type(key).__name__}, expected a string")
            check_names(self._file.path, [key])
            if key in found:
                raise ValueError(f"{printable(key)} is there twice")
            found[key] = self.value(depth + 1)
        return _chunked(self._file.path, found) if _CHUNKED in found else found

    def sequence(self, count: int, depth: int) -> NotNumbers:
        """Read past `count` values."""
        self._count(count)
        for _ in range(count):
            self.value(depth + 1)
        return NotNumbers("list")

    def string(self, length: int) -> str:
        """Return the string that follows."""
        return self._bytes(length).decode("utf-8")

    def _count(self, count: int) -> None:
        self._names += count
        if self._names > limits.NAMES:
            raise ValueError(f"more than {limits.NAMES} names")

    def raw(self, length: int) -> NotNumbers:
        """Read past bytes."""
        self._skip(length)
        return NotNumbers("bytes")

    def _skip(self, length: int) -> None:
        if length > self._file.size - self.at:
            raise ValueError(f"{length} bytes from byte {self.at} on, but the file ends at {self._file.size}")
        self.at += length
        self._opened.seek(self.at)

    def extension(self, length: int) -> Any:
        """Return the array that follows, or a placeholder."""
        kind, start = self.number("b"), self.at
        if kind not in (_ARRAY, _SCALAR):
            self._skip(length)
            return NotNumbers("complex" if kind == _COMPLEX else f"an extension of type {kind}")
        tensor = self._array(start + length)
        if self.at != start + length:
            raise ValueError(f"an array ends at byte {self.at}, its extension at {start + length}")
        return tensor

    def _array(self, end: int) -> Any:
        """Return the array that lies here: a list of its shape, the name of its dtype, and its bytes."""
        if self._bytes(1)[0] != 0x93:
            raise ValueError(f"the array before byte {self.at} is not described by shape, dtype and bytes")
        shape = check_shape(self._file.path, "an array", self._integers())
        name = self._length_of(_STRINGS, "the name of a dtype")
        dtype = DTYPES.get(self.string(name) if name <= limits.NAME_LENGTH else "")
        length = self._length_of(_BINARIES, "the bytes of an array")
        start = self.at
        self._skip(length)
        if self.at > end:
            raise ValueError(f"an array ends at byte {self.at}, its extension at {end}")
        if dtype is None:
            return NotNumbers("an array of another dtype")
        if (expected := prod(shape) * dtype.itemsize) != length:
            raise ValueError(f"an array has {length} bytes, {dtype} of shape {shape} would be {expected}")
        return InFile(dtype, shape, ByteRange(self._file, start, length))

    def _integers(self) -> list[Any]:
        if (axes := self._length_of(_LISTS, "a shape")) > _MOST_AXES:
            raise ValueError(f"an array has {axes} axes, at most {_MOST_AXES} are read")
        return [self.value(limits.DEPTH) for _ in range(axes)]

    def _length_of(self, codes: dict[int, str], what: str) -> int:
        code = self._bytes(1)[0]
        for fixed, bits in ((0xA0, 0x1F), (0x90, 0xF)):
            if codes.get(fixed) == "" and code & ~bits == fixed:
                return code & bits
        if codes.get(code, "") == "":
            raise ValueError(f"byte {self.at - 1} is {code:#x}, expected {what}")
        return int(self.number(codes[code]))


# First bytes of values with a length -> the type of the length; "" where it is within the byte.
_STRINGS = {0xA0: "", 0xD9: "B", 0xDA: "H", 0xDB: "I"}
_BINARIES = {0xC4: "B", 0xC5: "H", 0xC6: "I"}
_LISTS = {0x90: "", 0xDC: "H", 0xDD: "I"}
_MAPPINGS = {0xDE: "H", 0xDF: "I"}
_EXTENSIONS = {0xC7: "B", 0xC8: "H", 0xC9: "I"}
_FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_NUMBERS = dict(zip(range(0xCA, 0xD4), "fdBHIQbhiq", strict=True))
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}

_Read = Callable[[_Reader, int], Any]


def _constant(constant: Any, reader: _Reader, depth: int) -> Any:
    return constant


def _number(kind: str, reader: _Reader, depth: int) -> Any:
    return reader.number(kind)


def _fixed_extension(size: int, reader: _Reader, depth: int) -> Any:
    return reader.extension(size)


def _of_length(kind: str, read_rest: Callable[[_Reader, int, int], Any], reader: _Reader, depth: int) -> Any:
    return read_rest(reader, int(reader.number(kind)), depth)


# Values with a length -> what reads the rest of them.
_WITH_LENGTH: tuple[tuple[dict[int, str], Callable[[_Reader, int, int], Any]], ...] = (
    (_STRINGS, lambda reader, length, depth: reader.string(length)),
    (_BINARIES, lambda reader, length, depth: reader.raw(length)),
    (_LISTS, lambda reader, length, depth: reader.sequence(length, depth)),
    (_MAPPINGS, lambda reader, length, depth: reader.mapping(length, depth)),
    (_EXTENSIONS, lambda reader, length, depth: reader.extension(length)),
)


def _codes() -> Iterator[tuple[int, _Read]]:
    yield from ((code, partial(_constant, constant)) for code, constant in _CONSTANTS.items())
    yield from ((code, partial(_number, kind)) for code, kind in _NUMBERS.items())
    yield from ((code, partial(_fixed_extension, size)) for code, size in _FIXED_EXTENSIONS.items())
    for codes, read_rest in _WITH_LENGTH:
        yield from ((code, partial(_of_length, kind, read_rest)) for code, kind in codes.items() if kind)


_CODES: dict[int, _Read] = dict(_codes())


def _chunked(path: Path, found: dict[str, Any]) -> LazyTensor:
    """Return the array that Flax split into flat parts."""
    is_mapping = [isinstance(found.get(key), dict) for key in (_SHAPE, _CHUNKS)]
    if found.keys() != {_CHUNKED, _SHAPE, _CHUNKS} or not all(is_mapping):
        raise ValueError(f"an array in parts has {listed(map(printable, found))}, expected its shape and chunks")
    shape = check_shape(path, "an array in parts", _in_order(found[_SHAPE]))
    chunks = _in_order(found[_CHUNKS])
    if not chunks or not all(isinstance(chunk, InFile) and len(chunk.shape) == 1 for chunk in chunks):
        raise ValueError("the parts of an array are not flat arrays")
    dtype, sizes = chunks[0].dtype, [chunk.shape[0] for chunk in chunks]
    if any(chunk.dtype != dtype for chunk in chunks) or sum(sizes) != prod(shape):
        raise ValueError(f"{len(chunks)} parts have {sum(sizes)} numbers, an array of shape {shape} has {prod(shape)}")
    ends = np.cumsum(sizes).tolist()
    pieces = tuple(Piece((end - size,), chunk) for chunk, size, end in zip(chunks, sizes, ends, strict=True))
    return Joined(dtype, (prod(shape),), pieces).reshaped(shape)


def _in_order(found: dict[str, Any]) -> list[Any]:
    """Return what Flax keeps of a list or tuple: a mapping from "0", "1", …."""
    if found.keys() != set(map(str, range(len(found)))):
        raise ValueError("a list is not numbered from 0 on")
    return [found[str(index)] for index in range(len(found))]


def write(path: Path, tensors: Tensors, metadata: Metadata) -> Positions:
    """Fill a file with mappings nested by the steps of the names.

    Metadata have no place in it: Flax's readers would hand them over as one more leaf of the tree.
    """
    tree = _tree(tensors)
    positions: dict[str, tuple[Path, int]] = {}
    in_order = {name: tensors[name] for name in _leaves(tree)}
    blocks = prefetch_tensors(in_order)
    with VerifiedFile(path) as file:

        def put(node: Any) -> None:
            if isinstance(node, dict):
                file.write(_head(len(node), 0x80, 0xF, _MAPPINGS))
                for key, value in node.items():
                    text = key.encode()
                    file.write(_head(len(text), 0xA0, 0x1F, _STRINGS) + text)
                    put(value)
                return
            name, tensor, parts = next(blocks)
            if tensor.nbytes >= _CHUNK_BYTES:
                most = f"at most {_CHUNK_BYTES - 1} are written"
                raise WeightsError(f"{path}: {printable(name)} has {tensor.nbytes} bytes, {most}")
            file.write(_array_head(tensor))
            positions[name] = path, file.tell()
            for part in parts:
                file.write(part)

        put(tree)
        for _ in blocks:
            raise AssertionError("a tensor has no place in the tree")
    return positions


def _tree(tensors: Tensors) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name in tensors:
        *above, leaf = name.split(".")
        at = tree
        for step in above:
            at = at.setdefault(step, {})
            if not isinstance(at, dict):
                raise WeightsError(f"{printable(name)} is below another tensor, which .msgpack cannot hold")
        if leaf in at:
            raise WeightsError(f"{printable(name)} has others below it, which .msgpack cannot hold")
        at[leaf] = name
    return tree


def _leaves(tree: dict[str, Any]) -> Iterator[str]:
    for value in tree.values():
        if isinstance(value, dict):
            yield from _leaves(value)
        else:
            yield value


def _array_head(tensor: LazyTensor) -> bytes:
    """Return everything of an array but its bytes."""
    name = tensor.dtype.name.encode()
    shape = b"".join(b"\xcf" + size.to_bytes(8, "big") for size in tensor.shape)
    inside = b"\x93" + _head(len(tensor.shape), 0x90, 0xF, _LISTS) + shape
    inside += _head(len(name), 0xA0, 0x1F, _STRINGS) + name + b"\xc6" + tensor.nbytes.to_bytes(4, "big")
    return b"\xc9" + (len(inside) + tensor.nbytes).to_bytes(4, "big") + _ARRAY.to_bytes(1, "big") + inside


def _head(length: int, fixed: int, most: int, codes: dict[int, str]) -> bytes:
    """Return the first bytes of a value of this length."""
    if length <= most:
        return bytes([fixed | length])
    code = max(codes)  # a length of 32 bits
    return bytes([code]) + length.to_bytes(4, "big")


FORMAT = Format("Flax's msgpack", read, write, usual_naming=FLAX, verifies_itself=True, metadata_beside=True)
