"""What every format offers, and what they share."""

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
# What is said of the tensors as a whole; a value may still be under way, and then is `LATE` characters long.
Metadata = Mapping[str, "str | Future[str]"]
LATE = 64
# How files begin that people often have in place of weights, in small letters, and what they are.
_MISTAKEN = {
    b"version https://git-lfs.": "it is Git LFS's pointer to the file, which `git lfs pull` in its folder gets",
    b"<!doctype html": "it is a web page",
    b"<html": "it is a web page",
}
_BEGIN = max(map(len, _MISTAKEN))
# Of tensors whose bytes were read again and compared as they were written: the file and the byte where they begin.
Places = Mapping[str, tuple[Path, int]]


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Attributes:
        values: by name; `LazyTensor`, or from PyTorch's files whatever was saved, wrappers included.
        metadata: what the file says of itself.
    """

    values: Mapping[Any, Any]
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """One kind of file or folder.

    Attributes:
        name: for people.
        read: looks at what there is without reading numbers, as far as the format allows.
        write: fills the empty file or folder at a path; returns what need not be compared any more but for its place.
        torch_names: whether it always holds PyTorch's names.
        usual_naming: what it holds unless asked otherwise; None for the other twin's.
        keeps_metadata: whether it has a place for metadata.
        checks_itself: whether `write` compares all tensors.
        is_ours: None for files; for folders, whether a folder is one of this kind.
    """

    name: str
    read: Callable[[Path], Contents]
    write: Callable[[Path, Tensors, Metadata], Places]
    torch_names: bool = False
    usual_naming: str | None = None
    keeps_metadata: bool = True
    checks_itself: bool = False
    is_ours: Callable[[Path], bool] | None = None


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turn whatever a damaged file sets off in a library into a WeightsError."""
    try:
        yield
    except (WeightsError, OSError, ImportError):
        raise
    except Exception as error:
        what = _mistaken(path) or printable(next(iter(str(error).splitlines()), "") or type(error).__name__)
        raise WeightsError(f"{path}: not a readable {kind} file: {what}") from error


def _mistaken(path: Path) -> str | None:
    """Return what a file that cannot be read is, if it is what people often have in place of it."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        begin = file.read(_BEGIN).lower()
    return next((what for start, what in _MISTAKEN.items() if begin.startswith(start)), None)


def settled(metadata: Metadata) -> dict[str, str]:
    """Return metadata once all of it is known."""
    return {name: value if isinstance(value, str) else value.result() for name, value in metadata.items()}


def provisional(metadata: Metadata) -> dict[str, str]:
    """Return metadata of the same length without waiting for what is under way."""
    return {name: value if isinstance(value, str) else "0" * LATE for name, value in metadata.items()}


def check_shape(path: Path, name: str, shape: Any) -> tuple[int, ...]:
    """Return a shape from a file as a tuple.

    Raises:
        WeightsError: it is not a list of sizes, or of sizes that no tensor has.
    """
    good = isinstance(shape, list | tuple) and all(type(size) is int and size >= 0 for size in shape)
    if not good or len(shape) > 32 or prod(max(size, 1) for size in shape) > limits.NUMBERS:
        raise WeightsError(f"{path}: {printable(name)} has the shape {printable(str(shape)[:80])}, which no tensor has")
    return tuple(shape)


def check_names(path: Path, names: list[str]) -> None:
    """Raise a WeightsError if there are too many names, or one that is too long or comes twice."""
    if len(names) > limits.NAMES:
        raise WeightsError(f"{path}: {len(names)} names, at most {limits.NAMES} are read")
    if long := next((name for name in names if len(name) > limits.NAME_LENGTH), None):
        raise WeightsError(f"{path}: a name of {len(long)} characters, at most {limits.NAME_LENGTH} are read")
    if len(set(names)) < len(names):
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise WeightsError(f"{path}: {printable(twice)} is there twice")
