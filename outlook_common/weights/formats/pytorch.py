"""PyTorch's files: pickles, of which only what `weights_only=True` lets through is ever read."""

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlook_common.extras import require
from outlook_common.weights import limits
from outlook_common.weights.arrays import to_tensor
from outlook_common.weights.errors import WeightsError
from outlook_common.weights.formats.base import Contents, Format, Metadata, Places, Tensors, check_names, reading
from outlook_common.weights.shown import shown
from outlook_common.weights.table import TORCH

if TYPE_CHECKING:
    import torch


def read(path: Path) -> Contents:
    """Return what was saved, all of it read into memory."""
    require("torch", extra="torch", needed_by=f"{path.name}, a file of PyTorch's,")
    with reading(path, path.suffix):
        if zipfile.is_zipfile(path):
            _check_archive(path)
        elif path.stat().st_size > 0:
            _check_legacy(path)
        found = _load(path)
        if not isinstance(found, Mapping):
            raise TypeError(f"it holds {type(found).__name__}, expected a state_dict")
        _check_values(path, found)
    return Contents(dict(found))


def _load(path: Path) -> Any:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols that may not be understood: that is an error then
            # Not with mmap=True, which does not check that a tensor's numbers end where its record does.
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if blocked := re.search(r"GLOBAL (\S+)", str(error)):
            raise WeightsError(
                f"{path}: it refers to {shown(blocked[1])}, which is code and is not executed; "
                f"where you trust the file, load it with PyTorch and save its state_dict alone"
            ) from error
        raise


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    check_names(path, [info.filename for info in infos])
    size = path.stat().st_size
    if sum(info.compress_size for info in infos) > size:
        raise ValueError(f"its members would be longer than the file, {size} bytes: they overlap")
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise ValueError(f"{shown(info.filename)} is packed; PyTorch writes numbers as they are")
        if info.filename.endswith(".pkl") and info.file_size > limits.PICKLE_BYTES:
            raise ValueError(f"{shown(info.filename)} is {info.file_size} bytes long, at most {limits.PICKLE_BYTES}")


def _check_legacy(path: Path) -> None:
    """Refuse what is no pickle before PyTorch tries whether it is a tar archive, which it would unpack."""
    with path.open("rb") as file:
        if not file.read(1) == pickle.PROTO:
            raise ValueError("neither a ZIP archive nor a pickle")


def _check_values(path: Path, found: Mapping[Any, Any]) -> None:
    """Raise a WeightsError if mappings nest too deeply or too often, or a tensor is larger than its numbers."""
    import torch

    names, level = 0, [found]
    for _ in range(limits.DEPTH):
        names += sum(map(len, level))
        if names > limits.NAMES:
            raise WeightsError(f"{path}: more than {limits.NAMES} names")
        for mapping in level:
            _check_keys(path, mapping)
            for name, value in mapping.items():
                if isinstance(value, torch.Tensor):
                    _check_tensor(path, name, value)
        level = [value for mapping in level for value in mapping.values() if isinstance(value, Mapping)]
        if not level:
            return
    raise WeightsError(f"{path}: mappings nest more than {limits.DEPTH} deep")


def _check_keys(path: Path, keys: Iterable[Any]) -> None:
    for key in keys:
        if not isinstance(key, str | int):
            raise WeightsError(f"{path}: a name is {type(key).__name__}, expected a string")
        if isinstance(key, str) and len(key) > limits.NAME_LENGTH:
            raise WeightsError(f"{path}: a name of {len(key)} characters, at most {limits.NAME_LENGTH} are read")


def _check_tensor(path: Path, name: Any, tensor: "torch.Tensor") -> None:
    import torch

    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return  # `to_numpy` names it
    there = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > there:
        raise WeightsError(
            f"{path}: {shown(name)} has the shape {tuple(tensor.shape)}, that is {tensor.numel()} numbers, but only "
            f"{there} bytes"
        )


def write(path: Path, tensors: Tensors, metadata: Metadata) -> Places:
    """Fill a file with a state_dict, which has no place for metadata; all numbers are in memory at once."""
    require("torch", extra="torch", needed_by="writing a file of PyTorch's")
    import torch

    state = {name: to_tensor(tensor.read()) for name, tensor in tensors.items()}
    with path.open("r+b") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # what PyTorch makes of an error of the disk
            why = error.__cause__ or error.__context__ or error
            raise OSError(f"{path}: {why}") from error
    return {}


FORMAT = Format("PyTorch", read, write, torch_names=True, usual_naming=TORCH, keeps_metadata=False)
