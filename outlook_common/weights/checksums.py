"""SHA-256 of files and of tensors; of tensors alike in every naming and format."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from outlook_common.weights.formats import sharded
from outlook_common.weights.io.byte_range import UnchangedFile
from outlook_common.weights.io.lazy import LazyTensor

# Bytes of a file hashed at a time; large, since after each the thread waits for the converting ones.
_BLOCK_BYTES = 1 << 23


@dataclass(frozen=True)
class Checksum:
    """One line of a manifest: a tensor's PyTorch name, dtype, PyTorch shape and SHA-256.

    The SHA-256 is of the numbers in row-major order in PyTorch's layout, little-endian, without dtype or shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str

    def __str__(self) -> str:
        return f"{self.sha256}  {self.dtype}  {'x'.join(map(str, self.shape)) or 'scalar'}  {self.name}"


def checksums_of(tensors: Mapping[str, LazyTensor]) -> tuple[Checksum, ...]:
    """Return a checksum per tensor, in order; the manifest."""
    return tuple(checksum_of(name, tensor, tensor.blocks()) for name, tensor in tensors.items())


def checksum_of(name: str, tensor: LazyTensor, blocks: Iterable[np.ndarray]) -> Checksum:
    """Return the checksum of a tensor whose bytes are `blocks`."""
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block.data)
    return Checksum(name, tensor.dtype.name, tensor.shape, digest.hexdigest())


def combined_sha256(checksums: Iterable[Checksum]) -> str:
    """Return one SHA-256 of all lines sorted by name; equal for equal weights."""
    text = "".join(f"{line}\n" for line in sorted(checksums, key=lambda line: line.name))
    return hashlib.sha256(text.encode()).hexdigest()


def source_sha256(path: Path) -> str:
    """Return the SHA-256 of a file; for a folder, or an index with its shards, that of `sha256sum`'s list of them."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
    elif path.name.lower().endswith(sharded.INDEX_SUFFIX):
        files = sorted({path, *(path.with_name(shard) for shard in sharded.weight_map(path).values())})
    else:
        return _sha256(path)
    root = path if path.is_dir() else path.parent
    lines = "".join(f"{_sha256(file)}  {file.relative_to(root).as_posix()}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest, block = hashlib.sha256(), bytearray(_BLOCK_BYTES)
    with UnchangedFile.at(path).open() as file:
        while count := file.readinto(block):  # type: ignore[attr-defined]
            digest.update(memoryview(block)[:count])
    return digest.hexdigest()
