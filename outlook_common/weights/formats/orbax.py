"""Orbax checkpoints: folders, written by Orbax and read from its stores one array at a time."""

import json
import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
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
    Positions,
    Tensors,
    awaited,
    check_names,
    check_shape,
    damage_errors,
)
from outlook_common.weights.io import limits
from outlook_common.weights.io.interrupts import deferred_interrupts
from outlook_common.weights.io.lazy import LazyTensor
from outlook_common.weights.tables.base import FLAX

Leaf = tuple[str, ...]  # the path of a leaf in the saved tree

# Files that mark a folder as a tree saved by Orbax.
_MARKERS = ("_METADATA", "manifest.ocdbt")
# Other entries of such a folder; one with further entries is not replaced.
_PARTS = {"_METADATA", "_CHECKPOINT_METADATA", "_sharding", "array_metadatas", "commit_success.txt", "d"}
# Value types that Orbax stores as arrays.
_ARRAYS = {"np.ndarray", "jax.Array", "scalar"}
# How Orbax marks a place in a tuple or list among the steps of a path.
_SEQUENCE = 1
# Bytes of arrays saved in one step; each step takes milliseconds.
_BATCH_BYTES = 1 << 24
_MOST_FILES = 10 * limits.NAMES
# TensorStore reads with one thread: each keeps the memory it has freed.
_ONE_THREAD = {"file_io_concurrency": {"limit": 1}, "data_copy_concurrency": {"limit": 1}}
# Names of items with weights among several items of a checkpoint; preferred over others.
_ITEMS = ("default", "state", "model", "params")
# Folders of steps, as Orbax's manager names them.
_STEP = re.compile(r"(?:.+_)?\d+")
# Unfinished folders of this package and of Orbax.
_UNFINISHED = re.compile(r"^\.|\.orbax-checkpoint-tmp")


def is_orbax(folder: Path) -> bool:
    """Whether a folder is a tree saved by Orbax."""
    return any((folder / marker).exists() for marker in _MARKERS)


def item_of(folder: Path) -> Path | None:
    """Return the only Orbax tree in a folder: itself, an item of a checkpoint, or that of the only step.

    Raises:
        WeightsError: it has several; the message lists them.
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
        raise WeightsError(f"{folder}: it has several Orbax checkpoints, pass the path of one: {names}")
    return next(iter(items + steps), None)


def _is_replaceable(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()}
    return not names or (
        is_orbax(folder)
        and all(name in _PARTS or name in _MARKERS or name.startswith("ocdbt.process_") for name in names)
    )


class _InOrbax(LazyTensor):
    """An array of a checkpoint, open in TensorStore."""

    def __init__(self, folder: Path, array: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        super().__init__(dtype, shape)
        self._folder = folder
        self._array = array

    def read(self) -> np.ndarray:
        """Return the numbers."""
        with damage_errors(self._folder, "Orbax"):
            return np.asarray(self._array.read().result())


def read(path: Path) -> Contents:
    """Open a checkpoint; only metadata are read.

    Not with Orbax itself: it restores whole trees, and leaves threads behind when a file is damaged.
    """
    require("tensorstore", needed_by=f"{path.name}, an Orbax checkpoint,")
    path = path.absolute()
    with damage_errors(path, "Orbax"):
        file_bytes = _bytes_in(path)
        metadata = _read_metadata(path)
        entries = list(metadata["tree_metadata"].values())
        leaves = [(_leaf(entry), entry["value_metadata"]["value_type"]) for entry in entries]
        names = _names([leaf for leaf, _ in leaves], [_places(entry) for entry in entries])
        check_names(path, names)
        arrays = _open_arrays(path, metadata, [".".join(leaf) for leaf, kind in leaves if kind in _ARRAYS])
        values = {
            name: _value(path, name, arrays.get(".".join(leaf), kind))
            for name, (leaf, kind) in zip(names, leaves, strict=True)
        }
        unpacked = sum(value.nbytes for value in values.values() if isinstance(value, LazyTensor))
        _check_size("its arrays", unpacked, file_bytes)
        for name, array in arrays.items():
            _check_chunks(name, array, file_bytes)
        custom = metadata.get("custom_metadata") or {}
        return Contents(values, {key: value for key, value in custom.items() if isinstance(value, str)})


def _read_metadata(folder: Path) -> dict[str, Any]:
    path = folder / "_METADATA"
    if not path.exists():
        raise ValueError("it has no _METADATA, which lists its arrays")
    if (size := path.stat().st_size) > limits.HEADER_BYTES:
        raise ValueError(f"its _METADATA is {size} bytes long, at most {limits.HEADER_BYTES} are read")
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not isinstance(found.get("tree_metadata"), dict):
        raise ValueError("its _METADATA has no tree_metadata, which lists its arrays")
    return found


def _leaf(entry: Mapping[str, Any]) -> Leaf:
    steps = entry["key_metadata"]
    if len(steps) > limits.DEPTH:
        raise ValueError(f"an array lies {len(steps)} mappings deep, at most {limits.DEPTH} are read")
    leaf = tuple(str(step["key"]) for step in steps)
    # Haiku's modules are called "outer/inner".
    if not leaf or any(part in ("", ".", "..") or set(part) & set("\\\0") for step in leaf for part in step.split("/")):
        raise ValueError(f"{printable('.'.join(leaf))!r} is not a name of an array")
    return leaf


def _places(entry: Mapping[str, Any]) -> tuple[int, ...]:
    """Return which steps of the path of a leaf are places in tuples or lists."""
    return tuple(at for at, step in enumerate(entry["key_metadata"]) if step.get("key_type") == _SEQUENCE)


def _names(leaves: list[Leaf], places: list[tuple[int, ...]]) -> list[str]:
    """Return the names of leaves.

    An NNX variable is saved as a tree with one leaf "value", which is left out. So are the places in a tuple of trees
    that have no name in common, as `nnx.split` makes it of a model: parameters, statistics.
    """
    leaves_below = Counter(leaf[:steps] for leaf in leaves for steps in range(1, len(leaf)))
    below: dict[Leaf, dict[str, set[Leaf]]] = {}  # tuple -> place in it -> names below that
    for leaf, at in ((leaf, at) for leaf, steps in zip(leaves, places, strict=True) for at in steps):
        below.setdefault(leaf[:at], {}).setdefault(leaf[at], set()).add(leaf[at + 1 :])
    joined = {tree for tree, parts in below.items() if len(parts) > 1 and _are_disjoint(parts.values())}

    def name(leaf: Leaf) -> str:
        end = len(leaf) - (leaf[-1] == "value" and leaves_below[leaf[:-1]] == 1)
        return ".".join(step for at, step in enumerate(leaf[:end]) if leaf[:at] not in joined)

    return [name(leaf) for leaf in leaves]


def _are_disjoint(parts: Iterable[set[Leaf]]) -> bool:
    """Whether trees have leaves, each at least one, at paths of which none is that of another, or the start of one."""
    every = sorted(leaf for part in parts for leaf in part)
    return all(every) and all(other[: len(leaf)] != leaf for leaf, other in pairwise(every))


def _open_arrays(folder: Path, metadata: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """Open arrays by name: all in one OCDBT store, or each in its own folder."""
    import tensorstore

    driver, context = "zarr3" if metadata.get("use_zarr3") else "zarr", tensorstore.Context(_ONE_THREAD)

    def store_of(name: str) -> dict[str, Any]:
        if (folder / "manifest.ocdbt").exists():
            # Not a URL, in which "%20" would name another folder.
            return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}, "path": f"{name}/"}
        return {"driver": "file", "path": f"{folder}/{name}/"}

    futures = {
        name: tensorstore.open({"driver": driver, "kvstore": store_of(name)}, open=True, read=True, context=context)
        for name in names
    }
    return {name: future.result() for name, future in futures.items()}


def _value(path: Path, name: str, found: Any) -> Any:
    if isinstance(found, str):
        return found  # the type of a value that is no array; `to_numpy` refuses it
    dtype = found.dtype.numpy_dtype
    if not is_number(dtype):
        return f"an array of {dtype}"
    return _InOrbax(path, found, dtype, check_shape(path, name, tuple(found.shape)))


def _check_size(what: str, unpacked: int, file_bytes: int) -> None:
    if unpacked > max(limits.UNPACKED_BYTES, limits.UNPACKED_RATIO * file_bytes):
        raise ValueError(
            f"{what} would take {unpacked} bytes, more than {limits.UNPACKED_RATIO} times the {file_bytes} of its files"
        )


def _check_chunks(name: str, array: Any, file_bytes: int) -> None:
    """Raise a ValueError if a chunk, which is unpacked as a whole, takes much more memory than the files."""
    if "blosc" in json.dumps(array.codec.to_json()):  # it trusts the sizes stated in a chunk
        raise ValueError(f"{printable(name)} is compressed by blosc, which Orbax does not use")
    chunk = prod(size or 1 for size in array.chunk_layout.read_chunk.shape or ())  # a scalar has None
    _check_size(f"one chunk of {printable(name)}", chunk * array.dtype.numpy_dtype.itemsize, file_bytes)


def _bytes_in(folder: Path) -> int:
    """Return the total size in bytes of the files in a folder.

    Raises:
        ValueError: there are too many files, or links, devices or pipes, which Orbax does not create.
    """
    size, count = 0, 0
    for root, folders, files in os.walk(folder, onerror=_raise):
        for name in folders + files:
            status = Path(root, name).lstat()
            if not (stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)):
                kind = "link" if stat.S_ISLNK(status.st_mode) else "device or pipe"
                raise ValueError(f"{printable(Path(root, name).relative_to(folder))} is a {kind}, expected only files")
            size, count = size + status.st_size * stat.S_ISREG(status.st_mode), count + 1
        if count > _MOST_FILES:
            raise ValueError(f"it has at least {count} files and folders, at most {_MOST_FILES} are read")
    return size


def _raise(error: OSError) -> None:
    raise error


def write(path: Path, tensors: Tensors, metadata: Metadata) -> Positions:
    """Fill a folder with a tree of arrays by their dotted names; one batch or array is in memory at a time."""
    with deferred_interrupts() as check_interrupts:
        _write(path, tensors, metadata, check_interrupts)
    return {}


def _write(path: Path, tensors: Tensors, metadata: Metadata, check_interrupts: Callable[[], None]) -> None:
    require("jax", "orbax.checkpoint", needed_by="writing an Orbax checkpoint")
    import orbax.checkpoint as ocp
    from orbax.checkpoint import type_handlers

    class Handler(type_handlers.TypeHandler):  # type: ignore[misc]
        """Saves lazy tensors in batches, each as Orbax saves NumPy's arrays."""

        arrays = type_handlers.NumpyHandler()

        def typestr(self) -> str:
            return str(self.arrays.typestr())

        async def metadata(self, infos: Any) -> Any:
            return await self.arrays.metadata(infos)

        async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
            args = args or [ocp.SaveArgs()] * len(values)
            for start, end in _batches([value.nbytes for value in values]):
                check_interrupts()
                batch = [np.asarray(value.read(), order="C") for value in values[start:end]]
                for future in await self.arrays.serialize(batch, infos[start:end], args[start:end]):
                    future.result()
            return []

        async def deserialize(self, infos: Any, args: Any = None) -> Any:
            return await self.arrays.deserialize(infos, args)

    if empty := [name for name, tensor in tensors.items() if tensor.nbytes == 0]:
        raise WeightsError(f"{path}: Orbax cannot save empty arrays: {listed(empty)}")
    tree = _nested({tuple(name.split(".")): _Leaf(tensor) for name, tensor in tensors.items()})
    with _without_logs():
        registry = type_handlers.create_type_handler_registry((_Leaf, Handler()))
        handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
        args = ocp.args.PyTreeSave(item=tree, custom_metadata=awaited(metadata) or None)
        try:
            handler.save(path.absolute(), args=args)
            handler.finalize(path.absolute())
        except ValueError as error:  # how TensorStore reports errors of the disk
            if number := re.search(r"os_error_code='(\d+)'", str(error)):
                raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
            raise


def _batches(sizes: list[int]) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of consecutive batches of up to `_BATCH_BYTES` bytes, or of one array."""
    start, held = 0, 0
    for index, size in enumerate(sizes):
        if index > start and held + size > _BATCH_BYTES:
            yield start, index
            start, held = index, 0
        held += size
    yield start, len(sizes)


class _Leaf:
    """A lazy tensor with the attributes that Orbax reads from an array."""

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
                raise WeightsError(f"{printable('.'.join(path))} is below another tensor, which Orbax cannot save")
        if path[-1] in at:
            raise WeightsError(f"{printable('.'.join(path))} has others below it, which Orbax cannot save")
        at[path[-1]] = value
    return tree


@contextmanager
def _without_logs() -> Iterator[None]:
    """Silence Orbax's logs; failures are raised anyway."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


FORMAT = Format("Orbax", read, write, usual_naming=FLAX, is_replaceable=_is_replaceable)
