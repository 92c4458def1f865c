"""Keras `.h5`, read only: datasets as they lie in the file; kecam's VOLOs under PyTorch's names.

h5py finds the datasets, in a process of its own with limits: damaged files can make the HDF5 library crash. It reads
no numbers; those are read as from any other format.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from outlook_common.extras import require
from outlook_common.text import printable
from outlook_common.weights.errors import WeightsError
from outlook_common.weights.formats import hdf5_index
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
from outlook_common.weights.io.lazy import Computed, InFile, InMemory, Joined, LazyTensor
from outlook_common.weights.tables import kecam

_INDEX = Path(hdf5_index.__file__)
_SECONDS = 2 * hdf5_index.SECONDS  # of the clock


def read(path: Path) -> Contents:
    """Open a file; numbers are read later."""
    require("h5py", needed_by=f"reading {path.name}")
    file = UnchangedFile.at(path)
    with damage_errors(path, ".h5"):
        entries = _index(path)
        found = {_name(entry["name"]): _tensor(file, entry) for entry in entries}
        check_names(path, [_name(entry["name"]) for entry in entries])
        _check_apart(entries)
        return Contents(_in_torch(found))


def _index(path: Path) -> list[dict[str, Any]]:
    """Return what `hdf5_index` found."""
    command = [sys.executable, "-P", str(_INDEX), str(path), str(limits.NAMES), str(limits.DEPTH)]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise ValueError(f"the HDF5 library takes more than {_SECONDS} s to find its datasets") from None
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise ValueError(f"the HDF5 library ends with code {done.returncode} on it") from None
    if "error" in answer:
        raise ValueError(answer["error"])
    found: list[dict[str, Any]] = answer["found"]
    return found


def _name(path: str) -> str:
    """Return "layer/weight" of a path "layer/layer/weight:0", as Keras writes it."""
    layer, *rest = path.split("/")
    inner = [step for step in rest if step not in (layer, layer.rpartition("/")[2])]
    return "/".join([layer, *inner]).removesuffix(":0")


def _tensor(file: UnchangedFile, entry: Mapping[str, Any]) -> LazyTensor:
    name, dtype = entry["name"], np.dtype(entry["dtype"])
    shape = check_shape(file.path, name, entry["shape"])
    if dtype.kind not in "biuf":
        raise ValueError(f"{printable(name)} holds {printable(dtype)}, not plain numbers")
    size, offset = prod(shape) * dtype.itemsize, entry["offset"]
    if entry["bytes"] != size or not isinstance(offset, int) or not 0 <= offset <= file.size - size:
        raise ValueError(
            f"{printable(name)}, {dtype} of shape {shape}, is {size} bytes long; the file has {entry['bytes']} from "
            f"byte {offset} of {file.size}"
        )
    native = dtype.newbyteorder("=")
    tensor = InFile(dtype, shape, ByteRange(file, offset, size))
    return tensor if native == dtype else Computed(tensor, native, shape, lambda array: array.astype(native))


def _check_apart(entries: list[dict[str, Any]]) -> None:
    """Raise a ValueError if two datasets share bytes."""
    for one, other in pairwise(sorted(entries, key=lambda entry: (entry["offset"], entry["bytes"]))):
        if one["offset"] + one["bytes"] > other["offset"]:
            raise ValueError(f"{printable(one['name'])} and {printable(other['name'])} share bytes")


def _in_torch(found: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Return the tensors of kecam's VOLO under PyTorch's names, in its layout; others as they are."""
    left = dict(found)
    named: dict[str, LazyTensor] = {}
    of_layers = _of_layers(found)
    for piece in kecam.pieces(found):
        names = [of_layers.get(name, name) for name in piece.keras]
        parts = [part for name in names if name in found and (part := _part(piece, found[name])) is not None]
        if len(parts) == len(names):
            named[piece.torch] = parts[0] if len(parts) == 1 else Joined(parts)
            for name in names:
                left.pop(name, None)
    if len(left) >= len(found) / 2:
        return dict(found)
    for module, layer in kecam.BATCH_NORMS:
        if f"{layer}/gamma" in found:  # Keras counts no batches
            named[f"{module}.num_batches_tracked"] = InMemory(np.zeros((), np.int64))
    return named | left


def _of_layers(found: Mapping[str, LazyTensor]) -> dict[str, str]:
    """Return the layers that have one weight, and its name, however that is called."""
    inside: dict[str, list[str]] = {}
    for name in found:
        inside.setdefault(name.partition("/")[0], []).append(name)
    return {layer: names[0] for layer, names in inside.items() if len(names) == 1}


def _part(piece: kecam.Piece, tensor: LazyTensor) -> LazyTensor | None:
    """Return a tensor of Keras in PyTorch's layout, None if it has another number of axes."""
    shape = tensor.shape
    if piece.layout == "same":
        return tensor
    if piece.layout == "conv":
        if len(shape) != 4:
            return None
        out = tuple(shape[axis] for axis in (3, 2, 0, 1))
        return Computed(tensor, tensor.dtype, out, lambda array: array.transpose(3, 2, 0, 1))
    inputs = prod(shape[: piece.inputs])
    outputs = prod(shape[piece.inputs :])
    if not piece.inputs < len(shape) <= 3:
        return None
    return Computed(tensor, tensor.dtype, (outputs, inputs), lambda array: array.reshape(inputs, outputs).T)


def _write(path: Path, tensors: Tensors, metadata: Metadata) -> Positions:
    raise WeightsError(f"{path}: .h5 is read, not written; write .safetensors, .npz or .msgpack")


FORMAT = Format("Keras .h5", read, _write)
