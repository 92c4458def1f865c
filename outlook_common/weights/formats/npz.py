"""`.npz`: a ZIP archive with one NumPy array per member.

NumPy's format has no bfloat16: its bits are stored as uint16, and a further JSON member lists those names, beside the
metadata.
"""

import io
import json
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
    Positions,
    Tensors,
    awaited,
    check_shape,
    damage_errors,
)
from outlook_common.weights.formats.zip_members import members
from outlook_common.weights.io import limits
from outlook_common.weights.io.byte_range import ByteRange, UnchangedFile
from outlook_common.weights.io.lazy import Computed, InFile, LazyTensor
from outlook_common.weights.io.prefetch import prefetch_tensors
from outlook_common.weights.io.verified import VerifiedFile

_NOTE = "__metadata__"
_SUFFIX = ".npy"
_NPY_HEADER_BYTES = 1 << 14
_HEADER_READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read(path: Path) -> Contents:
    """Open an archive; only the header of each member is read."""
    file = UnchangedFile.at(path)
    with damage_errors(path, ".npz"):
        found = {name: _member(file, name, *member) for name, member in members(file, suffix=_SUFFIX).items()}
        note = _note(path, found)
        bfloat16 = note.get("bfloat16", [])
        for name in bfloat16:
            tensor = found[name]
            if tensor.dtype != np.uint16:
                raise ValueError(f"{printable(name)} holds {tensor.dtype}, its note says that it is bfloat16 in uint16")
            found[name] = tensor.view_as(BFLOAT16)
    if lost := sorted(name for name, tensor in found.items() if tensor.dtype.kind == "V" and name not in bfloat16):
        raise WeightsError(
            f"{path}: {listed(lost)} hold raw bytes ({found[lost[0]].dtype.str!r}): `np.savez` leaves "
            "bfloat16 so, and its dtype is lost; save them with `save_weights`, or as .safetensors"
        )
    return Contents(found, note.get("metadata", {}))


def _member(file: UnchangedFile, name: str, byte_range: ByteRange, size: int) -> LazyTensor:
    """Return one array of the archive; `size` is in bytes, with its header."""
    header = np.empty(min(size, _NPY_HEADER_BYTES), np.uint8)
    with byte_range.open() as stream:
        stream.fill(header)
    text = io.BytesIO(header.tobytes())
    if not text.getvalue().startswith(npy.MAGIC_PREFIX):
        raise ValueError(f"{printable(name)} is not a NumPy array: it starts differently")
    version = npy.read_magic(text)
    if version not in _HEADER_READERS:
        raise ValueError(f"{printable(name)} is of version {version} of .npy, only {list(_HEADER_READERS)} are read")
    shape, fortran, dtype = _HEADER_READERS[version](text)
    shape = check_shape(file.path, name, shape)
    if dtype.hasobject:
        raise ValueError(f"{printable(name)} holds Python objects, a pickle (allow_pickle), which is never read")
    if dtype.kind not in "biufUV" or dtype.names or dtype.subdtype:
        raise ValueError(f"{printable(name)} holds {printable(dtype)}, not plain numbers")
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
    """Remove the JSON member from `found` and return it, checked."""
    if _NOTE not in found:
        return {}
    text = found.pop(_NOTE)
    if text.dtype.kind != "U" or text.shape != () or text.nbytes > limits.HEADER_BYTES:
        raise ValueError(f"{_NOTE} holds {text.dtype} of shape {text.shape}, expected one string")
    note = json.loads(str(text.read()[()]))
    bfloat16, metadata = note.get("bfloat16", []), note.get("metadata", {})
    if not isinstance(bfloat16, list) or not set(bfloat16) <= found.keys():
        raise ValueError(f"{_NOTE} names bfloat16 tensors that are missing")
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{_NOTE} has metadata that are not a mapping of strings")
    return note


def write(path: Path, tensors: Tensors, metadata: Metadata) -> Positions:
    """Fill an archive, without compression; its list of members is written last."""
    if _NOTE in tensors:
        raise WeightsError(f"a tensor cannot be called {_NOTE} in .npz")
    positions: dict[str, tuple[Path, int]] = {}
    # Not `np.savez`: it takes names as keyword arguments, and has a parameter `file`.
    with VerifiedFile(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, tensor, blocks in prefetch_tensors(tensors):
            with _new_member(archive, name, tensor.dtype, tensor.shape) as member:
                positions[name] = path, file.tell()
                for block in blocks:
                    member.write(block.data)
        bfloat16 = [name for name, tensor in tensors.items() if tensor.dtype == BFLOAT16]
        note = {"bfloat16": bfloat16, "metadata": awaited(metadata)}
        if any(note.values()):
            text = np.array(json.dumps({name: value for name, value in note.items() if value}))
            with _new_member(archive, _NOTE, text.dtype, ()) as member:
                member.write(text.tobytes())
    return positions


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


FORMAT = Format("npz", read, write, verifies_itself=True)
