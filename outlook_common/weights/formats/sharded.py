"""Several `.safetensors` and an index that says which of them holds which tensor, as the Hub has large models."""

import json
import re
from collections.abc import Callable
from functools import partial
from itertools import groupby
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from outlook_common.text import printable
from outlook_common.weights.errors import WeightsError
from outlook_common.weights.formats import safetensors
from outlook_common.weights.formats.base import Contents, Format, Metadata, Places, Tensors, check_names, reading
from outlook_common.weights.io import limits

INDEX = "model.safetensors.index.json"
_SHARD = "model-{:05d}-of-{:05d}.safetensors"
_OURS = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def read(path: Path) -> Contents:
    """Return the tensors of all shards that an index names; only headers are read."""
    with reading(path, ".safetensors.index.json"):
        places = weight_map(path)
        shards = {name: safetensors.read(path.with_name(name)) for name in sorted(set(places.values()))}
        for shard, contents in shards.items():
            for name in contents.values:
                if places.get(name) != shard:
                    said = f"in {printable(places[name])}" if name in places else "nowhere"
                    raise ValueError(f"{printable(name)} lies in {printable(shard)}, its index says {said}")
        if lost := next((name for name, shard in places.items() if name not in shards[shard].values), None):
            raise ValueError(f"{printable(lost)} is not in {printable(places[lost])}, where its index says it is")
    metadata = {key: value for contents in shards.values() for key, value in contents.metadata.items()}
    return Contents({name: shards[shard].values[name] for name, shard in places.items()}, metadata)


def weight_map(path: Path) -> dict[str, str]:
    """Return {name: file} of an index; the files lie beside it.

    Raises:
        WeightsError: it is none, or names a file elsewhere.
    """
    with reading(path, ".safetensors.index.json"):
        if (size := path.stat().st_size) > limits.HEADER_BYTES:
            raise ValueError(f"it is {size} bytes long, at most {limits.HEADER_BYTES} are read")
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
        places = found.get("weight_map") if isinstance(found, dict) else None
        if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
            raise ValueError("it has no weight_map from names to files")
        check_names(path, list(places))
        for place in set(places.values()):
            if not _is_plain(place):
                raise ValueError(f"it names the file {printable(repr(place))}, which does not lie beside it")
    return places


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a name is there twice: {len(pairs)} entries, {len(found)} names")
    return found


def _is_plain(name: str) -> bool:
    """Whether a name is that of a file in the same folder, on every system."""
    kinds = (PurePosixPath, PureWindowsPath)
    return name.endswith(".safetensors") and "\0" not in name and all(kind(name).name == name for kind in kinds)


def is_ours(folder: Path) -> bool:
    """Whether a folder is empty or has nothing but shards and their index."""
    return all(path.name == INDEX or _OURS.fullmatch(path.name) for path in folder.iterdir())


def _write(largest: int, path: Path, tensors: Tensors, metadata: Metadata) -> Places:
    numbers = _shard_numbers(tensors, largest)
    count = max(numbers.values(), default=0) + 1
    files: dict[str, str] = {}
    places: dict[str, tuple[Path, int]] = {}
    for number, group in groupby(tensors, key=numbers.__getitem__):
        names, shard = list(group), _SHARD.format(number + 1, count)
        (path / shard).touch()
        places |= safetensors.write(path / shard, {name: tensors[name] for name in names}, metadata)
        files |= dict.fromkeys(names, shard)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (path / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return places


def _shard_numbers(tensors: Tensors, largest: int) -> dict[str, int]:
    numbers, number, held = {}, 0, 0
    for name, tensor in tensors.items():
        if held and held + tensor.nbytes > largest:
            number, held = number + 1, 0
        numbers[name] = number
        held += tensor.nbytes
    return numbers


def _write_index(path: Path, tensors: Tensors, metadata: Metadata) -> Places:
    raise WeightsError(f"{path}: shards are written into a folder; give its path and max_shard_size")


def folder_of_shards(largest: int) -> Format:
    """Return the format of a folder of shards with up to `largest` bytes of numbers each (one tensor at least).

    Raises:
        ValueError: `largest` is not positive.
    """
    if largest < 1:
        raise ValueError(f"max_shard_size must be at least 1 byte, got {largest}")
    write: Callable[[Path, Tensors, Metadata], Places] = partial(_write, largest)
    return Format(
        "sharded safetensors", lambda folder: read(folder / INDEX), write, checks_itself=True, is_ours=is_ours
    )


FORMAT = Format("sharded safetensors", read, _write_index)
