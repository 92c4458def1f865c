"""PyTorch's files: pickles, read only with `weights_only=True`."""

import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from outlook_common.arrays import NotNumbers, to_tensor
from outlook_common.extras import require
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
    damage_errors,
)
from outlook_common.weights.formats.pickle_stubs import PICKLE_STUBS, SCALARS
from outlook_common.weights.io import limits
from outlook_common.weights.tables.base import TORCH

if TYPE_CHECKING:
    import torch

# Types kept as they are; none has attributes of its own.
_PLAIN = {bool, int, float, complex, str, bytes, type(None), *SCALARS}
_LOADING = Lock()


def read(path: Path) -> Contents:
    """Read a file, all of it into memory."""
    require("torch", needed_by=f"{path.name}, a file of PyTorch's,")
    with damage_errors(path, path.suffix):
        if zipfile.is_zipfile(path):
            _check_archive(path)
        elif path.stat().st_size > 0:
            _check_legacy(path)
        found = _load(path)
        if not isinstance(found, dict):
            raise TypeError(f"it holds {type(found).__name__}, expected a state_dict")
        return Contents(_plain(path, found), _metadata(found))


def _metadata(found: dict[Any, Any]) -> dict[str, str]:
    """Return the metadata that `write` adds: strings in a state_dict's `_metadata`, as a pickle may hold anything."""
    versions = vars(found).get("_metadata") if hasattr(found, "__dict__") else None
    own = dict.get(versions, "") if isinstance(versions, dict) else None
    if not isinstance(own, dict) or len(own) > limits.NAMES:
        return {}
    texts = {name: text for name, text in dict.items(own) if type(name) is str and type(text) is str}
    return {name: text for name, text in texts.items() if len(name) <= limits.NAME_LENGTH}


def _load(path: Path) -> Any:
    import torch

    try:
        with warnings.catch_warnings(), _pickle_stubs():
            warnings.simplefilter("ignore")  # about pickle protocols; those it cannot read are errors
            # Not with mmap=True, which does not check that a tensor ends where its record does.
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if blocked := re.search(r"GLOBAL (\S+)", str(error)):
            raise WeightsError(
                f"{path}: it refers to {printable(blocked[1])}, which is code and is not executed; "
                f"if you trust the file, load it with PyTorch and save its state_dict alone"
            ) from error
        raise


@contextmanager
def _pickle_stubs() -> Iterator[None]:
    """Allow the stubs in pickles, except where PyTorch or the user allows the original."""
    from torch import serialization

    with _LOADING:  # PyTorch's list is global to all threads
        allowed = {
            item[1] if isinstance(item, tuple) else f"{item.__module__}.{item.__qualname__}"
            for item in serialization.get_safe_globals()
        }
        with serialization.safe_globals([(item, name) for name, item in PICKLE_STUBS.items() if name not in allowed]):
            yield


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    check_names(path, [info.filename for info in infos])
    size = path.stat().st_size
    if sum(info.compress_size for info in infos) > size:
        raise ValueError(f"its members would be longer than the file, {size} bytes: they overlap")
    if any(info.filename.endswith("/constants.pkl") for info in infos):
        raise ValueError("it is a TorchScript archive, that is code; if you trust it, save its state_dict alone")
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise ValueError(f"{printable(info.filename)} is compressed; PyTorch never compresses")
        if info.filename.endswith(".pkl") and info.file_size > limits.PICKLE_BYTES:
            raise ValueError(f"{printable(info.filename)} has {info.file_size} bytes, at most {limits.PICKLE_BYTES}")


def _check_legacy(path: Path) -> None:
    """Refuse files that are not pickles: PyTorch would try to unpack them as tar archives."""
    with path.open("rb") as file:
        if not file.read(1) == pickle.PROTO:
            raise ValueError("neither a ZIP archive nor a pickle")


def _plain(path: Path, found: dict[Any, Any]) -> dict[Any, Any]:
    """Return a copy with plain dictionaries, tensors, numbers and strings, without attributes set by the pickle.

    An attribute such as `__array_interface__` or `items` could make NumPy read any memory, or show each reader
    something else.

    Raises:
        WeightsError: mappings nest too deeply or have too many names, or a tensor is larger than its storage.
    """
    plain: dict[Any, Any] = {}
    names, level = 0, [(found, plain)]
    for _ in range(limits.DEPTH):
        names += sum(len(mapping) for mapping, _ in level)
        if names > limits.NAMES:
            raise WeightsError(f"{path}: more than {limits.NAMES} names")
        deeper = []
        for mapping, copy in level:
            _check_keys(path, dict.keys(mapping))
            for name, value in dict.items(mapping):
                if (inside := _mapping(value)) is not None:
                    copy[name] = {}
                    deeper.append((inside, copy[name]))
                else:
                    copy[name] = _leaf(path, name, value)
        level = deeper
        if not level:
            return plain
    raise WeightsError(f"{path}: mappings nest more than {limits.DEPTH} deep")


def _mapping(value: Any) -> dict[Any, Any] | None:
    """Return a mapping, or a list of them by their places, as of groups of parameters; None if it is neither."""
    if isinstance(value, dict):
        return value
    is_list = type(value) in (list, tuple) and value and all(isinstance(item, dict) for item in value)
    return dict(enumerate(value)) if is_list else None


def _leaf(path: Path, name: Any, value: Any) -> Any:
    import torch

    if type(value) in (torch.Tensor, torch.nn.Parameter):
        _check_tensor(path, name, value)
        return torch.Tensor.detach(value)
    return value if _is_plain(value) else NotNumbers(type(value).__name__)


def _is_plain(value: Any) -> bool:
    return type(value) in _PLAIN or (type(value) in (list, tuple) and all(type(item) in _PLAIN for item in value))


def _check_keys(path: Path, keys: Iterable[Any]) -> None:
    for key in keys:
        if not isinstance(key, str | int):
            raise WeightsError(f"{path}: a name is {type(key).__name__}, expected a string")
        if isinstance(key, str) and len(key) > limits.NAME_LENGTH:
            raise WeightsError(f"{path}: a name of {len(key)} characters, at most {limits.NAME_LENGTH} are read")


def _check_tensor(path: Path, name: Any, tensor: "torch.Tensor") -> None:
    import torch

    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return  # `to_numpy` refuses it
    stored = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > stored:
        raise WeightsError(
            f"{path}: {printable(name)} has the shape {tuple(tensor.shape)}, that is {tensor.numel()} numbers, but "
            f"only {stored} bytes"
        )


def write(path: Path, tensors: Tensors, metadata: Metadata) -> Positions:
    """Fill a file with a state_dict; all numbers are in memory at once.

    The metadata lie where `Module.state_dict` keeps the versions of modules: `load_state_dict` passes over them.
    """
    require("torch", needed_by="writing a file of PyTorch's")
    import torch

    state = OrderedDict((name, to_tensor(tensor.read())) for name, tensor in tensors.items())
    if own := awaited(metadata):
        state._metadata = {"": own}  # type: ignore[attr-defined]
    with path.open("r+b") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # how PyTorch reports errors of the disk
            why = error.__cause__ or error.__context__ or error
            raise OSError(f"{path}: {why}") from error
    return {}


FORMAT = Format("PyTorch", read, write, torch_names=True, usual_naming=TORCH)
