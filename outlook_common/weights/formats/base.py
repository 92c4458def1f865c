"""The interface of a file format, and checks that formats share."""

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from outlook_common.text import printable
from outlook_common.weights.errors import WeightsError
from outlook_common.weights.io import limits
from outlook_common.weights.io.lazy import LazyTensor

PathLike = str | os.PathLike[str]
Tensors = Mapping[str, LazyTensor]
# Metadata of a file; a value may still be computed, and then has `PENDING_LENGTH` characters.
Metadata = Mapping[str, "str | Future[str]"]
PENDING_LENGTH = 64
# Starts, in lower case, of files often found in place of weights -> what they are.
_NOT_WEIGHTS = {
    b"version https://git-lfs.": "it is a Git LFS pointer; `git lfs pull` in its folder downloads the file",
    b"<!doctype html": "it is a web page",
    b"<html": "it is a web page",
}
_LONGEST_START = max(map(len, _NOT_WEIGHTS))
# {name: (file, first byte)} of tensors whose bytes were verified as they were written.
Positions = Mapping[str, tuple[Path, int]]


@dataclass(frozen=True)
class Contents:
    """Contents of a file.

    Attributes:
        values: by name; `LazyTensor`, or in PyTorch's files whatever was saved, wrappers included.
        metadata: of the file.
    """

    values: Mapping[Any, Any]
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """A file or folder format.

    Attributes:
        name: for messages.
        read: opens a file; numbers are read later where the format allows.
        write: fills the empty file or folder at a path; returns the positions of tensors already verified.
        torch_names: whether it always holds PyTorch's names.
        usual_naming: the default naming to write; None for the other twin's.
        verifies_itself: whether `write` verifies all tensors.
        is_replaceable: None for files; for folders, whether an existing folder is of this format.
        metadata_beside: whether its metadata are in a file of their own, see `formats.beside`.
    """

    name: str
    read: Callable[[Path], Contents]
    write: Callable[[Path, Tensors, Metadata], Positions]
    torch_names: bool = False
    usual_naming: str | None = None
    verifies_itself: bool = False
    is_replaceable: Callable[[Path], bool] | None = None
    metadata_beside: bool = False


@contextmanager
def damage_errors(path: Path, kind: str) -> Iterator[None]:
    """Re-raise any error that a damaged file causes in a library as a WeightsError."""
    try:
        yield
    except (WeightsError, OSError, ImportError):
        raise
    except Exception as error:
        what = _other_kind(path) or printable(next(iter(str(error).splitlines()), "") or type(error).__name__)
        raise WeightsError(f"{path}: not a readable {kind} file: {what}") from error


def _other_kind(path: Path) -> str | None:
    """Return what an unreadable file is, if it is one of `_NOT_WEIGHTS`."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        start_of_file = file.read(_LONGEST_START).lower()
    return next((what for start, what in _NOT_WEIGHTS.items() if start_of_file.startswith(start)), None)


def awaited(metadata: Metadata) -> dict[str, str]:
    """Return metadata after waiting for pending values."""
    return {name: value if isinstance(value, str) else value.result() for name, value in metadata.items()}


def with_placeholders(metadata: Metadata) -> dict[str, str]:
    """Return metadata of the same length, with placeholders for pending values."""
    return {name: value if isinstance(value, str) else "0" * PENDING_LENGTH for name, value in metadata.items()}


def check_shape(path: Path, name: str, shape: Any) -> tuple[int, ...]:
    """Return a shape read from a file as a tuple.

    Raises:
        WeightsError: it is not a list of sizes, has more than 32 axes, or too many numbers.
    """
    is_list = isinstance(shape, list | tuple) and all(type(size) is int and size >= 0 for size in shape)
    if not is_list or len(shape) > 32 or prod(max(size, 1) for size in shape) > limits.NUMBERS:
        raise WeightsError(f"{path}: {printable(name)} has the shape {printable(str(shape)[:80])}, which no tensor has")
    return tuple(shape)


def check_names(path: Path, names: list[str]) -> None:
    """Raise a WeightsError if there are too many names, or a name is too long or a duplicate."""
    if len(names) > limits.NAMES:
        raise WeightsError(f"{path}: {len(names)} names, at most {limits.NAMES} are read")
    if long := next((name for name in names if len(name) > limits.NAME_LENGTH), None):
        raise WeightsError(f"{path}: a name of {len(long)} characters, at most {limits.NAME_LENGTH} are read")
    if len(set(names)) < len(names):
        seen: set[str] = set()
        duplicate = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise WeightsError(f"{path}: {printable(duplicate)} is there twice")
