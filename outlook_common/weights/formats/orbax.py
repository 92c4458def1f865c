"""Orbax checkpoints: folders, written by Orbax itself and read from the stores it writes, one array at a time."""

import json
import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from outlook_common.arrays import is_number
from outlook_common.extras import require
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
from outlook_common.weights.io.lazy import LazyTensor
from outlook_common.weights.tables.base import FLAX

Leaf = tuple[str, ...]  # of a leaf in the tree that was saved

# One of these marks a folder as a tree that Orbax saved.
_MARKS = ("_METADATA", "manifest.ocdbt")
# All that such a folder may have in it for it to be replaced.
_PARTS = {"_METADATA", "_CHECKPOINT_METADATA", "_sharding", "array_metadatas", "commit_success.txt", "d"}
# What Orbax keeps as arrays.
_ARRAYS = {"np.ndarray", "jax.Array", "scalar"}
# Bytes of arrays that are saved in one step; each step costs milliseconds.
_TOGETHER = 1 << 24
_FILES = 10 * limits.NAMES
# How many threads TensorStore reads with: what each has freed it keeps.
_ONE_AT_A_TIME = {"file_io_concurrency": {"limit": 1}, "data_copy_concurrency": {"limit": 1}}
# What Orbax calls a tree that was saved beside others, or a user who saved more than the model; these are preferred.
_ITEMS = ("default", "state", "model", "params")
# What its manager calls the folder of a step.
_STEP = re.compile(r"(?:.+_)?\d+")
# The names of folders that are not finished, ours and Orbax's.
_UNFINISHED = re.compile(r"^\.|\.orbax-checkpoint-tmp")


def is_orbax(folder: Path) -> bool:
    """Whether a folder is a tree that Orbax saved."""
    return any((folder / mark).exists() for mark in _MARKS)


def item_of(folder: Path) -> Path | None:
    """Return the one tree in a folder of Orbax's: itself, an item of a checkpoint, or that of the only step.

    Raises:
        WeightsError: it has several; the message names them.
    """
    if is_orbax(folder):
        return folder
    parts = [path for path in folder.iterdir() if path.is_dir() and not _UNFINISHED.search(path.name)]
    trees = [path for path in parts if is_orbax(path)]
    items = [path for path in trees if path.name in _ITEMS] or trees
    others = [path for path in parts if path not in trees and _STEP.fullmatch(path.name)]
    steps = [found for path in others if (found := item_of(path)) is not None]
    if len(items + steps) > 1:
        names = ", ".join(sorted(str(path.relative_to(folder)) for path in items + steps))
        raise WeightsError(f"{folder}: it has several Orbax checkpoints, give the path of one: {names}")
    return next(iter(items + steps), None)


def _is_ours(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()}
    return not names or (
        is_orbax(folder)
        and all(name in _PARTS or name in _MARKS or name.startswith("ocdbt.process_") for name in names)
    )


class _InOrbax(LazyTensor):
    """An array of a checkpoint: an open array of TensorStore, which Orbax keeps them in."""

    def __init__(self, folder: Path, array: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        super().__init__(dtype, shape)
        self._folder = folder
        self._array = array

    def read(self) -> np.ndarray:
        """Return its numbers."""
        with reading(self._folder, "Orbax"):
            return np.asarray(self._array.read().result())


def read(path: Path) -> Contents:
    """Return the arrays of a checkpoint; only what describes them is read.

    Not through Orbax itself: it restores whole trees, and leaves threads behind where a file is damaged.
    """
    require("tensorstore", extra="jax", needed_by=f"{path.name}, an Orbax checkpoint,")
    path = path.absolute()
    with reading(path, "Orbax"):
        there = _bytes_in(path)
        about = _about(path)
        leaves = [(_leaf(entry), entry["value_metadata"]["value_type"]) for entry in about["tree_metadata"].values()]
        names = _names([leaf for leaf, _ in leaves])
        check_names(path, names)
        arrays = _opened(path, about, [".".join(leaf) for leaf, kind in leaves if kind in _ARRAYS])
        values = {
            name: _value(path, name, arrays.get(".".join(leaf), kind))
            for name, (leaf, kind) in zip(names, leaves, strict=True)
        }
        unpacked = sum(value.nbytes for value in values.values() if isinstance(value, LazyTensor))
        _check_size("its arrays", unpacked, there)
        for name, array in arrays.items():
            _check_chunks(name, array, there)
        custom = about.get("custom_metadata") or {}
        return Contents(values, {key: value for key, value in custom.items() if isinstance(value, str)})


def _about(folder: Path) -> dict[str, Any]:
    path = folder / "_METADATA"
    if not path.exists():
        raise ValueError("it has no _METADATA, which names its arrays")
    if (size := path.stat().st_size) > limits.HEADER_BYTES:
        raise ValueError(f"its _METADATA is {size} bytes long, at most {limits.HEADER_BYTES} are read")
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not isinstance(found.get("tree_metadata"), dict):
        raise ValueError("its _METADATA has no tree_metadata, which names its arrays")
    return found


def _leaf(entry: Mapping[str, Any]) -> Leaf:
    leaf = tuple(str(step["key"]) for step in entry["key_metadata"])
    if not leaf or any(not step or step in (".", "..") or set(step) & set("/\\\0") for step in leaf):
        raise ValueError(f"{printable('.'.join(leaf))!r} is no name of an array")
    return leaf


def _names(leaves: list[Leaf]) -> list[str]:
    """Return what each leaf is called; NNX's variables are saved as trees of one leaf, called "value"."""
    leaves_below = Counter(leaf[:steps] for leaf in leaves for steps in range(1, len(leaf)))
    return [".".join(leaf[:-1] if leaf[-1] == "value" and leaves_below[leaf[:-1]] == 1 else leaf) for leaf in leaves]


def _opened(folder: Path, about: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """Return arrays by their names: all in one OCDBT store, or each in its own folder."""
    import tensorstore

    driver, context = "zarr3" if about.get("use_zarr3") else "zarr", tensorstore.Context(_ONE_AT_A_TIME)

    def place(name: str) -> dict[str, Any]:
        if (folder / "manifest.ocdbt").exists():
            # Not a URL, in which "%20" would be another folder's name.
            return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}, "path": f"{name}/"}
        return {"driver": "file", "path": f"{folder}/{name}/"}

    futures = {
        name: tensorstore.open({"driver": driver, "kvstore": place(name)}, open=True, read=True, context=context)
        for name in names
    }
    return {name: future.result() for name, future in futures.items()}


def _value(path: Path, name: str, found: Any) -> Any:
    if isinstance(found, str):
        return found  # the kind of something that is no array; `to_numpy` refuses it
    dtype = found.dtype.numpy_dtype
    if not is_number(dtype):
        return f"an array of {dtype}"
    return _InOrbax(path, found, dtype, check_shape(path, name, tuple(found.shape)))


def _check_size(what: str, unpacked: int, there: int) -> None:
    if unpacked > max(limits.UNPACKED_BYTES, limits.UNPACKED_RATIO * there):
        raise ValueError(
            f"{what} would take {unpacked} bytes, more than {limits.UNPACKED_RATIO} times the {there} of its files"
        )


def _check_chunks(name: str, array: Any, there: int) -> None:
    """Raise a ValueError if to read an array takes more memory than its numbers show: chunks are unpacked whole."""
    if "blosc" in json.dumps(array.codec.to_json()):  # which takes the sizes in a chunk for granted
        raise ValueError(f"{printable(name)} is packed by blosc, which Orbax does not use")
    chunk = prod(size or 1 for size in array.chunk_layout.read_chunk.shape or ())  # a scalar has None
    _check_size(f"one chunk of {printable(name)}", chunk * array.dtype.numpy_dtype.itemsize, there)


def _bytes_in(folder: Path) -> int:
    """Return how many bytes the files in a folder have.

    Raises:
        ValueError: there are links, devices or pipes, which Orbax does not make and which could lead anywhere, or too
            many files.
    """
    size, count = 0, 0
    for root, folders, files in os.walk(folder, onerror=_raise):
        for name in folders + files:
            status = Path(root, name).lstat()
            if not (stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)):
                kind = "link" if stat.S_ISLNK(status.st_mode) else "device or pipe"
                raise ValueError(f"{printable(Path(root, name).relative_to(folder))} is a {kind}, expected files alone")
            size, count = size + status.st_size * stat.S_ISREG(status.st_mode), count + 1
        if count > _FILES:
            raise ValueError(f"it has at least {count} files and folders, at most {_FILES} are read")
    return size


def _raise(error: OSError) -> None:
    raise error


def write(path: Path, tensors: Tensors, metadata: Metadata) -> Places:
    """Fill a folder with a tree of arrays: the names, split at their dots; one array at a time is in memory."""
    for module in ("jax", "orbax.checkpoint"):
        require(module, extra="jax", needed_by="writing an Orbax checkpoint")
    import orbax.checkpoint as ocp
    from orbax.checkpoint import type_handlers

    class Handler(type_handlers.NumpyHandler):  # type: ignore[misc]
        """Saves tensors, a few at a time, as if they were NumPy's arrays."""

        async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
            args = args or [ocp.SaveArgs()] * len(values)
            for start, end in _groups([value.nbytes for value in values]):
                arrays = [np.asarray(value.read(), order="C") for value in values[start:end]]
                for future in await super().serialize(arrays, infos[start:end], args[start:end]):
                    future.result()
            return []

    if empty := [name for name, tensor in tensors.items() if tensor.nbytes == 0]:
        raise WeightsError(f"{path}: Orbax cannot save arrays without numbers: {listed(empty)}")
    tree = _nested({tuple(name.split(".")): _Leaf(tensor) for name, tensor in tensors.items()})
    with _quietly():
        registry = type_handlers.create_type_handler_registry((_Leaf, Handler(deepcopy_host_arrays=False)))
        handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
        args = ocp.args.PyTreeSave(item=tree, custom_metadata=settled(metadata) or None)
        try:
            handler.save(path.absolute(), args=args)
            handler.finalize(path.absolute())
        except ValueError as error:  # what TensorStore makes of an error of the disk
            if number := re.search(r"os_error_code='(\d+)'", str(error)):
                raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
            raise
    return {}


def _groups(sizes: list[int]) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of consecutive groups of up to `_TOGETHER` bytes, or of one."""
    start, held = 0, 0
    for place, size in enumerate(sizes):
        if place > start and held + size > _TOGETHER:
            yield start, place
            start, held = place, 0
        held += size
    yield start, len(sizes)


class _Leaf:
    """A tensor with what Orbax asks of an array before it is saved."""

    def __init__(self, tensor: LazyTensor) -> None:
        self.read = tensor.read
        self.dtype, self.shape, self.ndim = tensor.dtype, tensor.shape, len(tensor.shape)
        self.nbytes, self.size = tensor.nbytes, tensor.nbytes // tensor.dtype.itemsize


def _nested(flat: Mapping[Leaf, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        at = tree
        for step in path[:-1]:
            at = at.setdefault(step, {})
            if not isinstance(at, dict):
                raise WeightsError(f"{printable('.'.join(path))} lies below another tensor, which Orbax cannot save")
        if path[-1] in at:
            raise WeightsError(f"{printable('.'.join(path))} has others below it, which Orbax cannot save")
        at[path[-1]] = value
    return tree


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep Orbax's notes on its own workings from the user; what fails is raised anyway."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


FORMAT = Format("Orbax", read, write, usual_naming=FLAX, is_ours=_is_ours)
