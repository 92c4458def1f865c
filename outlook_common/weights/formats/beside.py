"""Metadata of a file whose format has no place for them, in a JSON file beside it: `volo.msgpack.outlook.json`.

It names the file's size and a hash of both its ends: of a file that another program wrote in its place it says nothing.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from outlook_common.weights.formats.base import Metadata, awaited, damage_errors
from outlook_common.weights.io import limits

SUFFIX = ".outlook.json"
_FILE, _METADATA = "file", "metadata"
# Bytes of each end that are hashed: weights of any other training differ there.
_END_BYTES = 1 << 16


def beside(path: Path) -> Path:
    """Return where the metadata of a file are."""
    return path.with_name(path.name + SUFFIX)


def read(path: Path) -> dict[str, str]:
    """Return the metadata beside a file; empty if there are none, or if they are of another file.

    Raises:
        WeightsError: what is beside it is damaged.
    """
    own = beside(path)
    if not own.is_file():
        return {}
    with damage_errors(own, SUFFIX):
        found = json_object(own)
        metadata = strings(found.get(_METADATA), own.name)
        return metadata if found.get(_FILE) == _identity(path) else {}


def write(own: Path, file: Path, metadata: Metadata) -> None:
    """Fill the file `own` with the metadata of `file`."""
    text = json.dumps({_FILE: _identity(file), _METADATA: awaited(metadata)}, indent=2)
    own.write_text(text + "\n", encoding="utf-8")


def _identity(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with path.open("rb") as file:
        ends = file.read(_END_BYTES)
        file.seek(max(0, size - _END_BYTES))
        ends += file.read(_END_BYTES)
    return {"bytes": size, "sha256_of_ends": hashlib.sha256(ends).hexdigest()}


def json_object(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        ValueError: it is too long, no JSON or no object.
    """
    if (size := path.stat().st_size) > limits.HEADER_BYTES:
        raise ValueError(f"its {path.name} is {size} bytes long, at most {limits.HEADER_BYTES} are read")
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"its {path.name} holds {type(found).__name__}, expected an object")
    return found


def strings(found: Any, name: str) -> dict[str, str]:
    """Return metadata from a file of this name; raise a ValueError if they are no mapping of strings."""
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError(f"its {name} is not a mapping of strings")
    return found
