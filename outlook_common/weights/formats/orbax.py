"""Orbax checkpoints: folders, read and written by Orbax itself, one array at a time."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from outlook_common.extras import require
from outlook_common.weights import limits
from outlook_common.weights.arrays import DTYPES
from outlook_common.weights.errors import WeightsError
from outlook_common.weights.formats.base import (
    Contents,
    Format,
    Metadata,
    Tensors,
    check_names,
    check_shape,
    reading,
    settled,
)
from outlook_common.weights.shown import shown
from outlook_common.weights.stored import Stored
from outlook_common.weights.table import FLAX

Leaf = tuple[str, ...]  # of a leaf in the tree that was saved

# One of these marks a folder as a tree that Orbax saved.
_MARKS = ("_METADATA", "manifest.ocdbt")
# All that such a folder may have in it for it to be replaced.
_PARTS = {"_METADATA", "_CHECKPOINT_METADATA", "_sharding", "array_metadatas", "commit_success.txt", "d"}
# Bytes of arrays that are saved in one step; each step costs milliseconds.
_TOGETHER = 1 << 24
# What Orbax calls a tree that was saved beside others.
_ITEMS = ("default", "state", "model", "params")


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
    items = [folder / name for name in _ITEMS if is_orbax(folder / name)]
    steps = [found for path in folder.iterdir() if path.name.isdigit() and (found := item_of(path)) is not None]
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


class _InOrbax(Stored):
    """An array of a checkpoint, read through TensorStore as Orbax does, but without restoring a tree for each."""

    def __init__(self, store: "_Store", leaf: Leaf, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        super().__init__(dtype, shape)
        self._store = store
        self._leaf = leaf

    def read(self) -> np.ndarray:
        """Return its numbers."""
        name = ".".join(self._leaf)
        with reading(self._store.folder, "Orbax"):
            array = self._store.read(name)
        if array.dtype != self.dtype or array.shape != self.shape:
            raise WeightsError(
                f"{self._store.folder}: {shown(name)} holds {array.dtype} {array.shape}, expected {self.dtype} "
                f"{self.shape}"
            )
        return array


class _Store:
    """Where the arrays of a checkpoint lie: one Zarr array each, all in one OCDBT store or each in its folder."""

    def __init__(self, folder: Path) -> None:
        import tensorstore

        self.folder = folder
        about = folder / "_METADATA"
        if about.stat().st_size > limits.HEADER_BYTES:
            raise WeightsError(f"{about}: {about.stat().st_size} bytes, at most {limits.HEADER_BYTES} are read")
        self._driver = "zarr3" if json.loads(about.read_text()).get("use_zarr3") else "zarr"
        self._context = tensorstore.Context()

    def read(self, name: str) -> np.ndarray:
        """Return one array."""
        import tensorstore

        if (self.folder / "manifest.ocdbt").exists():
            place = {"driver": "ocdbt", "base": f"file://{self.folder}/", "path": f"{name}/"}
        else:
            place = {"driver": "file", "path": f"{self.folder}/{name}/"}
        spec = {"driver": self._driver, "kvstore": place}
        array = tensorstore.open(spec, open=True, read=True, context=self._context).result()
        return np.asarray(array.read().result())


def read(path: Path) -> Contents:
    """Return the arrays of a checkpoint; only what describes them is read."""
    for module in ("jax", "orbax.checkpoint"):
        require(module, extra="jax", needed_by=f"{path.name}, an Orbax checkpoint,")
    import orbax.checkpoint as ocp

    path = path.absolute()
    with reading(path, "Orbax"), _quietly():
        store = _Store(path)
        found = ocp.PyTreeCheckpointHandler().metadata(path)
        leaves = dict(_leaves(found.tree))
        is_nnx = bool(leaves) and all(leaf[-1] == "value" and len(leaf) > 1 for leaf in leaves)
        names = {leaf: ".".join(leaf[:-1] if is_nnx else leaf) for leaf in leaves}  # NNX's variables have one value
        check_names(path, list(names.values()))
        values = {names[leaf]: _value(store, leaf, about) for leaf, about in leaves.items()}
        custom = found.custom_metadata or {}
    return Contents(values, {key: value for key, value in custom.items() if isinstance(value, str)})


def _leaves(tree: Any, above: Leaf = ()) -> Iterator[tuple[Leaf, Any]]:
    if isinstance(tree, Mapping):
        for key, below in tree.items():
            yield from _leaves(below, (*above, str(key)))
    elif isinstance(tree, list | tuple):
        for index, below in enumerate(tree):
            yield from _leaves(below, (*above, str(index)))
    elif tree is not None:
        yield above, tree


def _value(store: _Store, leaf: Leaf, about: Any) -> Any:
    shape, dtype = getattr(about, "shape", None), getattr(about, "dtype", None)
    if shape is None or dtype is None or np.dtype(dtype) not in DTYPES.values():
        return about  # no array of numbers; `to_numpy` names it
    return _InOrbax(store, leaf, np.dtype(dtype), check_shape(store.folder, ".".join(leaf), tuple(shape)))


def write(path: Path, tensors: Tensors, metadata: Metadata) -> None:
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
        raise WeightsError(f"{path}: Orbax cannot save arrays without numbers: {', '.join(map(shown, empty))}")
    tree = _nested({tuple(name.split(".")): _Leaf(tensor) for name, tensor in tensors.items()})
    with _quietly():
        registry = type_handlers.create_type_handler_registry((_Leaf, Handler()))
        handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
        handler.save(path.absolute(), args=ocp.args.PyTreeSave(item=tree, custom_metadata=settled(metadata) or None))
        handler.finalize(path.absolute())


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

    def __init__(self, tensor: Stored) -> None:
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
                raise WeightsError(f"{shown('.'.join(path))} lies below another tensor, which Orbax cannot save")
        if path[-1] in at:
            raise WeightsError(f"{shown('.'.join(path))} has others below it, which Orbax cannot save")
        at[path[-1]] = value
    return tree


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep Orbax's notes on its own workings from the user, and errors in."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


FORMAT = Format("Orbax", read, write, usual_naming=FLAX, is_ours=_is_ours)
