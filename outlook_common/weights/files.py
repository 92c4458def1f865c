"""Files of named arrays: `.safetensors`, `.npz`, and PyTorch's. Written whole or not at all."""

import json
import os
import pickle
import re
import shutil
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors
import safetensors.numpy

from outlook_common.extras import require
from outlook_common.weights.arrays import BFLOAT16, DTYPES, contiguous, same_bits, to_numpy, to_tensor
from outlook_common.weights.errors import WeightsError

Arrays = Mapping[str, np.ndarray]
PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Format:
    """How one kind of file is read and written; `torch_only` if PyTorch alone reads it."""

    read: Callable[[Path], dict[str, Any]]
    write: Callable[[IO[bytes], Arrays, Mapping[str, str]], None]
    torch_only: bool = False


def format_of(path: PathLike) -> Format:
    """Return the format that the suffix of `path` names.

    Raises:
        WeightsError: the suffix is unknown; the message lists those known.
    """
    name = Path(path).name.lower()
    for suffix, file_format in FORMATS.items():
        if name.endswith(suffix):
            return file_format
    raise WeightsError(f"{path}: unknown suffix of a weight file; known: {', '.join(FORMATS)}")


def read_arrays(path: PathLike) -> dict[str, Any]:
    """Return what a file holds: {name: NumPy array}; from PyTorch's, as it was saved, tensors and wrappers alike.

    Nothing in the file is executed.

    Raises:
        WeightsError: the suffix is unknown, or the file is not what its suffix says, or damaged, or would have to
            be executed to be read.
        OSError: the file cannot be opened.
        ImportError: one of PyTorch's own, and PyTorch is not installed.
    """
    return format_of(path).read(Path(path))


def write_arrays(path: PathLike, arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write a file, whole or not at all: what stood there is replaced once the new one is read back equal, bit by bit.

    Args:
        path: its suffix decides the format.
        arrays: by name; NumPy's, PyTorch's or JAX's.
        metadata: kept in the header of `.safetensors`; other formats have no place for it.

    Raises:
        WeightsError: the suffix is unknown, or what was read back differs.
        TypeError: something is not an array of numbers.
        OSError: the file cannot be written.
        ImportError: the format is one of PyTorch's own, and PyTorch is not installed.
    """
    path, file_format = Path(path), format_of(path)
    arrays = {name: contiguous(to_numpy(array)) for name, array in arrays.items()}
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file_format.write(file, arrays, metadata or {})
            file.flush()
            os.fsync(file.fileno())
        _check_written(file_format.read(temporary), arrays, path)
        if path.exists():
            shutil.copymode(path, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _check_written(found: Mapping[str, Any], expected: Arrays, path: Path) -> None:
    differing = [
        name for name, array in expected.items() if name not in found or not same_bits(to_numpy(found[name]), array)
    ]
    if differing or len(found) != len(expected):
        raise WeightsError(
            f"{path}: not written, what was read back differs: {len(found)} tensors of {len(expected)}, "
            f"and other bits in {differing}"
        )


def _sync_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # Windows has no such thing
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file sets off in a library into a WeightsError."""
    try:
        yield
    except (WeightsError, OSError, ImportError):
        raise
    except Exception as error:
        what = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise WeightsError(f"{path}: not a readable {''.join(path.suffixes[-1:])} file: {what}") from error


# .safetensors. Its NumPy interface writes bfloat16 but cannot read it; its own `deserialize` can.

_SAFETENSORS_DTYPES = {
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    **{
        f"{letter}{bits}": f"{kind}{bits}" for letter, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
    },
    "BOOL": "bool",
}


def _read_safetensors(path: Path) -> dict[str, Any]:
    with _reading(path):
        tensors = safetensors.deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    if strange := {name: spec["dtype"] for name, spec in tensors if spec["dtype"] not in _SAFETENSORS_DTYPES}:
        raise WeightsError(f"{path}: unknown dtypes {strange}; known: {', '.join(_SAFETENSORS_DTYPES)}")
    arrays = {}
    for name, spec in tensors:
        dtype = DTYPES[_SAFETENSORS_DTYPES[spec["dtype"]]].newbyteorder("<")
        arrays[name] = to_numpy(np.frombuffer(spec["data"], dtype).reshape(spec["shape"]))
    return arrays


def _write_safetensors(file: IO[bytes], arrays: Arrays, metadata: Mapping[str, str]) -> None:
    file.write(safetensors.numpy.save(dict(arrays), dict(metadata)))


# .npz. NumPy's own format forgets what bfloat16 was, so its bits are stored as uint16, and which those are in one
# more member.

_NPZ_NOTE = "__metadata__"


def _read_npz(path: Path) -> dict[str, Any]:
    # Opened here, since `np.load` leaves a damaged file open.
    with path.open("rb") as file, _reading(path):
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it holds one array without a name")
        arrays = {name: archive[name] for name in archive.files}
        note = json.loads(str(arrays.pop(_NPZ_NOTE, "{}")))
        arrays |= {name: arrays[name].view(BFLOAT16) for name in note.get("bfloat16", ())}
    if lost := sorted(name for name, array in arrays.items() if array.dtype != BFLOAT16 and array.dtype.kind == "V"):
        raise WeightsError(
            f"{path}: {', '.join(lost)} hold raw bytes ({arrays[lost[0]].dtype.str!r}): `np.savez` leaves bfloat16 so, "
            f"and which numbers they are is lost; save them with `save_weights`, or as .safetensors"
        )
    return arrays


def _write_npz(file: IO[bytes], arrays: Arrays, metadata: Mapping[str, str]) -> None:
    bfloat16 = [name for name, array in arrays.items() if array.dtype == BFLOAT16]
    members = {name: array.view(np.uint16) if name in bfloat16 else array for name, array in arrays.items()}
    if bfloat16:
        members[_NPZ_NOTE] = np.array(json.dumps({"bfloat16": bfloat16}))
    # Not `np.savez`: it takes the names as keyword arguments, and "file" is its own.
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in members.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


# PyTorch's files are pickles: only what `weights_only=True` lets through is ever read.


def _read_torch(path: Path) -> dict[str, Any]:
    require("torch", extra="torch", needed_by=f"{path.name}, a file of PyTorch's,")
    import torch

    with _reading(path):
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if blocked := re.search(r"GLOBAL (\S+)", str(error)):
                raise WeightsError(
                    f"{path}: it refers to {blocked[1]}, which is code and is not executed; "
                    f"where you trust the file, load it with PyTorch and save its state_dict alone"
                ) from error
            raise
        if not isinstance(found, Mapping):
            raise TypeError(f"it holds {type(found).__name__}, expected a state_dict")
    return dict(found)


def _write_torch(file: IO[bytes], arrays: Arrays, metadata: Mapping[str, str]) -> None:
    require("torch", extra="torch", needed_by="writing a file of PyTorch's")
    import torch

    torch.save({name: to_tensor(array) for name, array in arrays.items()}, file)


_TORCH = Format(_read_torch, _write_torch, torch_only=True)

FORMATS = {
    ".safetensors": Format(_read_safetensors, _write_safetensors),
    ".npz": Format(_read_npz, _write_npz),
    ".pth": _TORCH,
    ".pt": _TORCH,
    ".pth.tar": _TORCH,
    ".bin": _TORCH,
}
