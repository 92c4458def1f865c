"""Shards with an index of tensor name -> file, as on the Hub: `.safetensors`, or PyTorch's `.bin` to read."""

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from outlook_common.text import printable
from outlook_common.weights.errors import WeightsError
from outlook_common.weights.formats import pytorch, safetensors
from outlook_common.weights.formats.base import (
    Contents,
    Format,
    Metadata,
    Positions,
    Tensors,
    check_names,
    damage_errors,
)
from outlook_common.weights.io import limits

SINGLE = "model.safetensors"
INDEX, INDEX_SUFFIX = f"{SINGLE}.index.json", ".index.json"
# Suffix of a shard -> what opens it.
_READERS = {".safetensors": safetensors.read, ".bin": pytorch.read, ".pt": pytorch.read, ".pth": pytorch.read}
_SHARD_NAME = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def read(path: Path) -> Contents:
    """Open an index and its shards; only headers are read, of PyTorch's shards everything."""
    with damage_errors(path, INDEX_SUFFIX):
        files = weight_map(path)
        shards = {name: _READERS[Path(name).suffix](path.with_name(name)) for name in sorted(set(files.values()))}
        for shard, contents in shards.items():
            for name in contents.values:
                if files.get(name) != shard:
                    listed = f"in {printable(files[name])}" if name in files else "nowhere"
                    raise ValueError(f"{printable(name)} lies in {printable(shard)}, its index says {listed}")
        if lost := next((name for name, shard in files.items() if name not in shards[shard].values), None):
            raise ValueError(f"{printable(lost)} is not in {printable(files[lost])}, where its index says it is")
    metadata = {key: value for contents in shards.values() for key, value in contents.metadata.items()}
    return Contents({name: shards[shard].values[name] for name, shard in files.items()}, metadata)


def weight_map(path: Path) -> dict[str, str]:
    """Return {tensor name: file name} of an index.

    Raises:
        WeightsError: it is not an index, or names a file in another folder.
    """
    with damage_errors(path, INDEX_SUFFIX):
        if (size := path.stat().st_size) > limits.HEADER_BYTES:
            raise ValueError(f"it is {size} bytes long, at most {limits.HEADER_BYTES} are read")
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
        files = found.get("weight_map") if isinstance(found, dict) else None
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise ValueError("it has no weight_map from names to files")
        check_names(path, list(files))
        for file in set(files.values()):
            if not _is_plain(file):
                raise ValueError(f"it names the file {printable(repr(file))}, which is not in its folder")
    return files


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a name is there twice: {len(pairs)} entries, {len(found)} names")
    return found


def _is_plain(name: str) -> bool:
    """Whether a name is that of a shard in the same folder, on every system."""
    kinds = (PurePosixPath, PureWindowsPath)
    return Path(name).suffix in _READERS and "\0" not in name and all(kind(name).name == name for kind in kinds)


def _is_replaceable(texts: Mapping[str, str], folder: Path) -> bool:
    """Whether a folder has nothing but shards, their index, and files of these names."""
    own = {INDEX, SINGLE, *texts}
    return all(path.name in own or _SHARD_NAME.fullmatch(path.name) for path in folder.iterdir())


def _write(
    max_bytes: int | str, texts: Mapping[str, str], path: Path, tensors: Tensors, metadata: Metadata
) -> Positions:
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_bytes,
    )
    positions: dict[str, tuple[Path, int]] = {}
    for shard, names in split.filename_to_tensors.items():
        (path / shard).touch()
        positions |= safetensors.write(path / shard, {name: tensors[name] for name in names}, metadata)
    if split.is_sharded:
        files = {name: split.tensor_to_filename[name] for name in tensors}  # large tensors come first in it
        index = {"metadata": split.metadata, "weight_map": files}
        (path / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for name, text in texts.items():
        (path / name).write_text(text, encoding="utf-8")
    return positions


def _read_folder(folder: Path) -> Contents:
    return read(folder / INDEX) if (folder / INDEX).exists() else safetensors.read(folder / SINGLE)


def _write_index(path: Path, tensors: Tensors, metadata: Metadata) -> Positions:
    raise WeightsError(f"{path}: shards are written into a folder; pass its path and max_shard_size")


def folder_of_shards(max_bytes: int | str, texts: Mapping[str, str] | None = None) -> Format:
    """Return the format of a folder of shards with up to `max_bytes` of numbers each, or one tensor.

    What fits into one file has no index, as on the Hub.

    Args:
        max_bytes: also as a string, "5GB".
        texts: further files of the folder, by name.

    Raises:
        ValueError: `max_bytes` is not positive.
    """
    if isinstance(max_bytes, int) and max_bytes < 1:
        raise ValueError(f"max_shard_size must be at least 1 byte, got {max_bytes}")
    return Format(
        "sharded safetensors",
        _read_folder,
        partial(_write, max_bytes, texts or {}),
        verifies_itself=True,
        is_replaceable=partial(_is_replaceable, texts or {}),
    )


FORMAT = Format("sharded safetensors", read, _write_index)
