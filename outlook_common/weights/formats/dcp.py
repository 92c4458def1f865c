"""Folders of PyTorch's distributed checkpoints (DCP): `.metadata` beside `.distcp` files with parts of tensors.

Read without PyTorch: `.metadata` is a pickle that names each tensor's blocks, and where in which file each lies, in an
archive as `torch.save` writes it.
"""

import json
import warnings
from collections.abc import Iterator
from itertools import pairwise
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from outlook_common.arrays import DTYPES, NotNumbers, to_tensor
from outlook_common.extras import require
from outlook_common.text import printable
from outlook_common.weights.formats import beside
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
)
from outlook_common.weights.formats.restricted_pickle import Constant, Record, load, record
from outlook_common.weights.formats.torch_archive import open_tensor
from outlook_common.weights.io import limits
from outlook_common.weights.io.byte_range import UnchangedFile
from outlook_common.weights.io.lazy import LazyTensor
from outlook_common.weights.io.pieces import Joined, Piece, tiling_error
from outlook_common.weights.tables.base import TORCH

METADATA = ".metadata"
_OWN_METADATA = "outlook.json"
_MOST_BLOCKS = 10 * limits.NAMES
_MODULE = "torch.distributed.checkpoint"

_Metadata, _Tensor, _Bytes, _Block, _Properties, _Index, _Stored = (
    record(name)
    for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "_StorageInfo",
    )
)  # fmt: skip
_Size = record("Size")
_STUBS: dict[str, Any] = {
    **{f"{_MODULE}.metadata.{stub.kind}": stub for stub in (_Metadata, _Tensor, _Bytes, _Block, _Properties, _Index)},
    f"{_MODULE}.metadata.StorageMeta": record("StorageMeta"),
    f"{_MODULE}.metadata._MEM_FORMAT_ENCODING": record("_MEM_FORMAT_ENCODING"),
    f"{_MODULE}.filesystem._StorageInfo": _Stored,
    "torch.Size": _Size,
    "torch.serialization._get_layout": record("layout"),
    "collections.OrderedDict": record("OrderedDict"),
    **{f"pathlib.{name}": record(name) for name in ("PosixPath", "WindowsPath", "PurePosixPath", "Path")},
    **{f"pathlib._local.{name}": record(name) for name in ("PosixPath", "WindowsPath")},
    **{f"torch.{name}": Constant(dtype) for name, dtype in DTYPES.items()},
}


def is_dcp(folder: Path) -> bool:
    """Whether a folder is a distributed checkpoint."""
    return (folder / METADATA).is_file()


def _is_replaceable(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()}
    return not names or (
        METADATA in names and all(name in (METADATA, _OWN_METADATA) or name.endswith(".distcp") for name in names)
    )


def read(path: Path) -> Contents:
    """Open a checkpoint; the list of its tensors is read, and checked against the sizes of its files."""
    with damage_errors(path, "DCP"):
        found = _read_metadata(path)
        names = list(found.tensors)
        if any(not isinstance(name, str) for name in names):
            raise TypeError("a name is not a string")
        check_names(path, names)
        files = _Files(path)
        values = _nested({found.path(name): _value(files, found, name) for name in names}, len(names))
        files.check_disjoint()
        return Contents(values, _own_metadata(path))


def _own_metadata(folder: Path) -> dict[str, str]:
    """Return what `write` adds, which DCP has no place for."""
    path = folder / _OWN_METADATA
    if not path.is_file() or path.is_symlink():
        return {}
    return beside.strings(beside.json_object(path), _OWN_METADATA)


def _nested(values: dict[tuple[str, ...], Any], count: int) -> dict[str, Any]:
    if len(values) < count:
        raise ValueError(f"two of its {count} tensors were at the same place of the saved mapping")
    tree: dict[str, Any] = {}
    for path, value in values.items():
        at = tree
        for step in path[:-1]:
            at = at.setdefault(step, {})
            if not isinstance(at, dict):
                raise ValueError(f"{printable('.'.join(path))} is below another tensor")
        if path[-1] in at:
            raise ValueError(f"{printable('.'.join(path))} has others below it")
        at[path[-1]] = value
    return tree


class _Found:
    """What `.metadata` says: a description of each name, and where each block lies."""

    def __init__(self, tensors: dict[Any, Any], stored: dict[tuple[str, tuple[int, ...]], Record], paths: Any) -> None:
        self.tensors, self.stored = tensors, stored
        self._paths = paths if isinstance(paths, dict) else {}

    def path(self, name: str) -> tuple[str, ...]:
        """Return where in the saved mapping a tensor was."""
        path = self._paths.get(name)
        if not isinstance(path, tuple) or not path:
            return (name,)
        if len(path) > limits.DEPTH or not all(isinstance(step, str | int) for step in path):
            raise ValueError(f"{printable(name)} was at {printable(str(path)[:80])}, which is no place in a mapping")
        return tuple(map(str, path))


def _read_metadata(folder: Path) -> _Found:
    path = folder / METADATA
    if not is_dcp(folder):
        raise ValueError(f"it has no {METADATA}, which lists its tensors")
    file = UnchangedFile.at(path)
    if file.size > limits.HEADER_BYTES:
        raise ValueError(f"its {METADATA} is {file.size} bytes long, at most {limits.HEADER_BYTES} are read")
    with file.open() as opened:
        found = load(opened.read(), _STUBS)
    tensors, places = _field(found, _Metadata, "state_dict_metadata", dict), found.field("storage_data")
    if not isinstance(places, dict):
        raise TypeError(f"its {METADATA} does not say where the tensors lie")
    stored: dict[tuple[str, tuple[int, ...]], Record] = {}
    for index, place in places.items():
        name, offset = _field(index, _Index, "fqn", str), index.field("offset")
        key = name, () if offset is None else _size(folder, name, offset)
        if key in stored:
            raise ValueError(f"{printable(name)} at {key[1]} is there twice")
        if not isinstance(place, _Stored):
            raise TypeError(f"{printable(name)} has no place in a file")
        stored[key] = place
    if len(stored) > _MOST_BLOCKS:
        raise ValueError(f"it has {len(stored)} blocks, at most {_MOST_BLOCKS} are read")
    return _Found(tensors, stored, found.field("planner_data"))


def _field(found: Any, stub: type[Record], name: str, kind: type[Any]) -> Any:
    if not isinstance(found, stub) or not isinstance(found.field(name), kind):
        raise TypeError(f"a {stub.kind} with {name} is expected")
    return found.field(name)


def _size(folder: Path, name: str, found: Any) -> tuple[int, ...]:
    """Return a `torch.Size` as a tuple."""
    if not isinstance(found, _Size) or len(found.arguments) != 1:
        raise TypeError(f"{printable(name)} has no sizes")
    return check_shape(folder, name, found.arguments[0])


def _value(files: "_Files", found: _Found, name: str) -> Any:
    about = found.tensors[name]
    if isinstance(about, _Bytes):
        return NotNumbers("a pickled object")
    shape = _size(files.folder, name, _field(about, _Tensor, "size", Record))
    blocks = [
        tuple(_size(files.folder, name, _field(block, _Block, part, Record)) for part in ("offsets", "sizes"))
        for block in _field(about, _Tensor, "chunks", list)
    ]
    dtype = _dtype(about)
    if dtype is None:
        return NotNumbers("an array of another dtype")
    if len(blocks) > _MOST_BLOCKS:
        raise ValueError(f"{printable(name)} has {len(blocks)} blocks, at most {_MOST_BLOCKS} are read")
    if (error := tiling_error(shape, [(offsets, sizes) for offsets, sizes in blocks])) is not None:
        raise ValueError(f"{printable(name)}: {error}")
    pieces = []
    for offsets, sizes in blocks:
        if (place := found.stored.get((name, offsets))) is None:
            raise ValueError(f"{printable(name)} has a block at {offsets}, of which it is not said where it lies")
        pieces.append(Piece(offsets, files.block(name, place, dtype, sizes)))
    return Joined(dtype, shape, tuple(pieces))


def _dtype(about: Record) -> np.dtype[Any] | None:
    """Return the dtype that a tensor's properties begin with; None if NumPy lacks it."""
    properties = about.field("properties")
    state = properties.state if isinstance(properties, _Properties) else None
    first = state[0] if isinstance(state, tuple) and state else None
    return first.value if isinstance(first, Constant) else None


class _Files:
    """The `.distcp` files of a folder, each opened once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, UnchangedFile] = {}
        self._taken: dict[str, list[tuple[int, int]]] = {}

    def block(self, name: str, place: Record, dtype: np.dtype[Any], shape: tuple[int, ...]) -> LazyTensor:
        """Return the block of a tensor that lies at this place."""
        file_name, offset, length = (place.field(field) for field in ("relative_path", "offset", "length"))
        file = self._file(file_name)
        if type(offset) is not int or type(length) is not int or not 0 <= offset <= offset + length <= file.size:
            at = printable(f"{offset!r}, {length!r} bytes long"[:80])
            raise ValueError(f"{printable(name)} lies at byte {at}; the file ends at {file.size}")
        if place.field("transform_descriptors"):
            raise ValueError(f"{printable(name)} is packed, which is not read")
        if (expected := prod(shape) * dtype.itemsize) > length:
            raise ValueError(f"{printable(name)} has {length} bytes, {dtype} of shape {shape} takes {expected}")
        self._taken.setdefault(str(file_name), []).append((offset, offset + length))
        return _InArchive(file, offset, length, dtype, shape)

    def _file(self, name: Any) -> UnchangedFile:
        if not isinstance(name, str) or "\0" in name:
            raise TypeError("a file has no name")
        kinds = (PurePosixPath, PureWindowsPath)
        if not name.endswith(".distcp") or any(kind(name).name != name for kind in kinds):
            raise ValueError(f"it names the file {printable(repr(name))}, which is not a .distcp file in its folder")
        if name not in self._files:
            path = self.folder / name
            if path.is_symlink() or not path.is_file():
                raise ValueError(f"{printable(name)} is {'no file' if path.exists() else 'missing'}")
            self._files[name] = UnchangedFile.at(path)
        return self._files[name]

    def check_disjoint(self) -> None:
        """Raise a ValueError if two blocks share bytes."""
        for name, taken in self._taken.items():
            taken.sort()
            for (_, end), (start, _) in pairwise(taken):
                if start < end:
                    raise ValueError(f"two blocks in {printable(name)} share the bytes from {start} to {end}")


class _InArchive(LazyTensor):
    """A block of a tensor, in an archive that is opened when its numbers are read."""

    def __init__(
        self, file: UnchangedFile, start: int, size: int, dtype: np.dtype[Any], shape: tuple[int, ...]
    ) -> None:
        super().__init__(dtype, shape)
        self._file, self._start, self._size = file, start, size

    def _tensor(self) -> LazyTensor:
        with damage_errors(self._file.path, "DCP"):
            found = open_tensor(self._file, self._start, self._size)
            if (found.dtype, found.shape) != (self.dtype, self.shape):
                raise ValueError(
                    f"the block at byte {self._start} holds {found.dtype} of shape {found.shape}, {METADATA} says "
                    f"{self.dtype} of shape {self.shape}"
                )
        return found

    def read(self) -> np.ndarray:
        """Return the numbers."""
        return self._tensor().read()

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield the bytes."""
        return self._tensor().blocks()


def write(path: Path, tensors: Tensors, metadata: Metadata) -> Positions:
    """Fill a folder with a checkpoint, and a file of its own for metadata; all numbers are in memory at once."""
    require("torch", needed_by="writing a distributed checkpoint of PyTorch's")
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    state = {name: to_tensor(tensor.read()) for name, tensor in tensors.items()}
    writer = FileSystemWriter(path, single_file_per_rank=True, sync_files=False, thread_count=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not run by several processes
        save(state, storage_writer=writer, no_dist=True)
    if own := awaited(metadata):
        (path / _OWN_METADATA).write_text(json.dumps(own), encoding="utf-8")
    return {}


FORMAT = Format("DCP", read, write, torch_names=True, usual_naming=TORCH, is_replaceable=_is_replaceable)
