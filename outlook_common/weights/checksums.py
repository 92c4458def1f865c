"""Hashes: of files as they are, and of tensors as PyTorch would have them, alike in every naming and format."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from outlook_common.weights.formats import sharded
from outlook_common.weights.io.byte_range import KnownFile
from outlook_common.weights.io.lazy import LazyTensor

# Bytes of a file that are hashed at a time: many, since each time the thread waits for those that convert.
_AT_ONCE = 1 << 23


@dataclass(frozen=True)
class Line:
    """One tensor: PyTorch's name and shape, and the SHA-256 of its numbers row by row in PyTorch's layout.

    The numbers are hashed as they lie in memory, little-endian, without dtype or shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str

    def __str__(self) -> str:
        return f"{self.sha256}  {self.dtype}  {'x'.join(map(str, self.shape)) or 'scalar'}  {self.name}"


def manifest_of(tensors: Mapping[str, LazyTensor]) -> tuple[Line, ...]:
    """Return a line per tensor, in order."""
    return tuple(line_of(name, tensor, tensor.blocks()) for name, tensor in tensors.items())


def line_of(name: str, tensor: LazyTensor, blocks: Iterable[np.ndarray]) -> Line:
    """Return the line of a tensor whose bytes are given."""
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block.data)
    return Line(name, tensor.dtype.name, tensor.shape, digest.hexdigest())


def sha256_of(lines: Iterable[Line]) -> str:
    """Return one hash of all lines, in the order of their names: equal for equal weights."""
    text = "".join(f"{line}\n" for line in sorted(lines, key=lambda line: line.name))
    return hashlib.sha256(text.encode()).hexdigest()


def source_sha256(path: Path) -> str:
    """Return the SHA-256 of a file; of a folder, or of an index and its shards, that of a list of them."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
    elif path.name.lower().endswith(sharded.INDEX.removeprefix("model")):
        files = sorted({path, *(path.with_name(shard) for shard in sharded.weight_map(path).values())})
    else:
        return _sha256(path)
    root = path if path.is_dir() else path.parent
    listed = "".join(f"{_sha256(file)}  {file.relative_to(root).as_posix()}\n" for file in files)
    return hashlib.sha256(listed.encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest, block = hashlib.sha256(), bytearray(_AT_ONCE)
    with KnownFile.look(path).open() as file:
        while count := file.readinto(block):  # type: ignore[attr-defined]
            digest.update(memoryview(block)[:count])
    return digest.hexdigest()
