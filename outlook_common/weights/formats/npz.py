"""`.npz`: a ZIP archive of NumPy's arrays, one member each.

NumPy's own format forgets what bfloat16 was, so its bits are stored as uint16, and which those are in the JSON of one
more member, together with the metadata.
"""

import io
import json
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from outlook_common.arrays import BFLOAT16
from outlook_common.text import listed, printable
from outlook_common.weights.errors import WeightsError
from outlook_common.weights.formats.base import (
    Contents,
    Format,
    Metadata,
    Places,
    Tensors,
    check_names,
    check_shape,
    reading,
    settled,
)
from outlook_common.weights.io import limits
from outlook_common.weights.io.byte_range import ByteRange, KnownFile
from outlook_common.weights.io.lazy import Computed, InFile, LazyTensor
from outlook_common.weights.io.prefetch import each_ahead
from outlook_common.weights.io.verified import VerifiedFile

_NOTE = "__metadata__"
_SUFFIX = ".npy"
_UTF8 = 0x800
# Flags of members that are read: how hard deflate tried, where sizes stand, how names are written. Not encryption.
_FLAGS = 0x6 | 0x8 | _UTF8
# Of a member's own header: its length without name and extra field, and where the lengths of those stand.
_LOCAL_BYTES, _LOCAL_LENGTHS = 30, struct.Struct("<26x2H")
_LOCAL_MAGIC = b"PK\3\4"
_NPY_HEADER_BYTES = 1 << 14
_HEADER_READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read(path: Path) -> Contents:
    """Return the tensors of an archive; of each member only the header is read."""
    file = KnownFile.look(path)
    with reading(path, ".npz"):
        members = _members(file)
        check_names(path, list(members))
        found = {name: _member(file, name, byte_range, size) for name, (byte_range, size) in members.items()}
        note = _note(path, found)
        bfloat16 = note.get("bfloat16", [])
        for name in bfloat16:
            tensor = found[name]
            if tensor.dtype != np.uint16:
                raise ValueError(f"{printable(name)} holds {tensor.dtype}, its note says that it is bfloat16 in uint16")
            found[name] = tensor.seen_as(BFLOAT16)
    if lost := sorted(name for name, tensor in found.items() if tensor.dtype.kind == "V" and name not in bfloat16):
        raise WeightsError(
            f"{path}: {listed(lost)} hold raw bytes ({found[lost[0]].dtype.str!r}): `np.savez` leaves "
            "bfloat16 so, and which numbers they are is lost; save them with `save_weights`, or as .safetensors"
        )
    return Contents(found, note.get("metadata", {}))


def _members(file: KnownFile) -> dict[str, tuple[ByteRange, int]]:
    """Return where each member lies, and how long it is unpacked, having checked the archive as a whole."""
    with file.open() as opened, zipfile.ZipFile(opened) as archive:
        infos = archive.infolist()
        names = [info.filename.removesuffix(_SUFFIX) for info in infos]
        check_names(file.path, names)
        _check_sizes(file, infos)
        return {name: (_extent(file, opened, info), info.file_size) for name, info in zip(names, infos, strict=True)}


def _check_sizes(file: KnownFile, infos: list[zipfile.ZipInfo]) -> None:
    at = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset < at:
            raise ValueError(f"{printable(info.filename)} overlaps the member before it")
        at = info.header_offset + _LOCAL_BYTES + info.compress_size
    if at > file.size:
        raise ValueError(f"its members end at byte {at}, the file at {file.size}")
    unpacked = sum(info.file_size for info in infos)
    if unpacked > max(limits.UNPACKED_BYTES, limits.UNPACKED_RATIO * file.size):
        raise ValueError(
            f"its {file.size} bytes unpack to {unpacked}, more than {limits.UNPACKED_RATIO} times as many: a ZIP bomb?"
        )


def _extent(file: KnownFile, opened: Any, info: zipfile.ZipInfo) -> ByteRange:
    if info.flag_bits & ~_FLAGS:
        raise ValueError(f"{printable(info.filename)} is encrypted or patched: flags {info.flag_bits:#x}")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{printable(info.filename)} is packed by method {info.compress_type}, only 0 and 8 are read")
    if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
        raise ValueError(f"{printable(info.filename)} is {info.file_size} bytes long, {info.compress_size} are there")
    opened.seek(info.header_offset)
    header = opened.read(_LOCAL_BYTES)
    if not header.startswith(_LOCAL_MAGIC) or len(header) < _LOCAL_BYTES:
        raise ValueError(f"{printable(info.filename)} is not where the archive says")
    name_length, extra_length = _LOCAL_LENGTHS.unpack(header)
    own_name = opened.read(name_length).decode("utf-8" if info.flag_bits & _UTF8 else "cp437")
    if own_name != info.orig_filename:
        raise ValueError(f"{printable(info.filename)} is called {printable(own_name)} where it lies")
    start = info.header_offset + _LOCAL_BYTES + name_length + extra_length
    deflated = info.compress_type == zipfile.ZIP_DEFLATED
    return ByteRange(file, start, info.compress_size, deflated, crc=info.CRC)


def _member(file: KnownFile, name: str, byte_range: ByteRange, size: int) -> LazyTensor:
    """Return one array of the archive, `size` bytes long with its header."""
    header = np.empty(min(size, _NPY_HEADER_BYTES), np.uint8)
    with byte_range.open() as stream:
        stream.fill(header)
    text = io.BytesIO(header.tobytes())
    if not text.getvalue().startswith(npy.MAGIC_PREFIX):
        raise ValueError(f"{printable(name)} is none of NumPy's arrays, which begin otherwise")
    version = npy.read_magic(text)
    if version not in _HEADER_READERS:
        raise ValueError(f"{printable(name)} is of version {version} of .npy, only {list(_HEADER_READERS)} are read")
    shape, fortran, dtype = _HEADER_READERS[version](text)
    shape = check_shape(file.path, name, shape)
    if dtype.hasobject:
        raise ValueError(f"{printable(name)} holds Python objects, a pickle, which would need allow_pickle; never read")
    if dtype.kind not in "biufUV" or dtype.names or dtype.subdtype:
        raise ValueError(f"{printable(name)} holds {printable(dtype)}, no plain numbers")
    if (expected := text.tell() + prod(shape) * dtype.itemsize) != size:
        raise ValueError(f"{printable(name)} is {size} bytes long, {dtype} of shape {shape} would be {expected}")
    data = ByteRange(file, byte_range.offset, byte_range.size, byte_range.deflated, text.tell(), byte_range.crc)
    native = dtype.newbyteorder("=")
    if not fortran and native == dtype:
        return InFile(dtype, shape, data)
    if not fortran:
        return Computed(InFile(dtype, shape, data), native, shape, lambda array: array.astype(native))
    return Computed(InFile(dtype, shape[::-1], data), native, shape, lambda array: array.astype(native).T)


def _note(path: Path, found: dict[str, LazyTensor]) -> dict[str, Any]:
    """Take the member that says what the others are out of `found`."""
    if _NOTE not in found:
        return {}
    text = found.pop(_NOTE)
    if text.dtype.kind != "U" or text.shape != () or text.nbytes > limits.HEADER_BYTES:
        raise ValueError(f"{_NOTE} holds {text.dtype} of shape {text.shape}, expected one string")
    note = json.loads(str(text.read()[()]))
    bfloat16, metadata = note.get("bfloat16", []), note.get("metadata", {})
    if not isinstance(bfloat16, list) or not set(bfloat16) <= found.keys():
        raise ValueError(f"{_NOTE} names bfloat16 tensors that are not there")
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{_NOTE} has metadata that are no mapping of strings")
    return note


def write(path: Path, tensors: Tensors, metadata: Metadata) -> Places:
    """Fill an archive, unpacked; what makes it one, its list of members, comes last."""
    if _NOTE in tensors:
        raise WeightsError(f"a tensor cannot be called {_NOTE} in .npz")
    places: dict[str, tuple[Path, int]] = {}
    # Not `np.savez`: it takes the names as keyword arguments, and "file" is its own.
    with VerifiedFile(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, tensor, blocks in each_ahead(tensors):
            with _new_member(archive, name, tensor.dtype, tensor.shape) as member:
                places[name] = path, file.tell()
                for block in blocks:
                    member.write(block.data)
        bfloat16 = [name for name, tensor in tensors.items() if tensor.dtype == BFLOAT16]
        note = {"bfloat16": bfloat16, "metadata": settled(metadata)}
        if any(note.values()):
            text = np.array(json.dumps({name: value for name, value in note.items() if value}))
            with _new_member(archive, _NOTE, text.dtype, ()) as member:
                member.write(text.tobytes())
    return places


@contextmanager
def _new_member(
    archive: zipfile.ZipFile, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> Iterator[IO[bytes]]:
    header = io.BytesIO()
    descr = "<u2" if dtype == BFLOAT16 else npy.dtype_to_descr(dtype)
    npy.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
    with archive.open(zipfile.ZipInfo(f"{name}{_SUFFIX}"), "w", force_zip64=True) as member:
        member.write(header.getvalue())
        yield member


FORMAT = Format("npz", read, write, checks_itself=True)
