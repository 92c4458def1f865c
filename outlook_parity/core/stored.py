"""Results that wait for their comparison in a temporary file instead of in memory. Imports no framework.

A twin's gradients, moments and activations take several times the memory of its weights. Each is written as soon as it
is computed, and read again, one at a time, when both twins have it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from functools import partial
from os import SEEK_END
from tempfile import TemporaryFile
from typing import IO, NamedTuple
from weakref import finalize

import numpy as np

# Smaller arrays stay in memory.
LEAST_BYTES = 1 << 16


class Place(NamedTuple):
    """Where an array lies in a file."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype


Kept = np.ndarray | Place


class Shelf:
    """Arrays, the large ones in a temporary file without a name: what it takes is free when nothing refers to it."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None

    def keep(self, array: np.ndarray) -> Kept:
        """Write an array, or copy a small one; return what `read` takes."""
        if array.nbytes < LEAST_BYTES:
            return array.copy()
        if self._file is None:
            self._file = TemporaryFile(prefix="outlook-parity-")  # noqa: SIM115
            finalize(self, self._file.close)
        place = Place(self._file.seek(0, SEEK_END), array.shape, array.dtype)
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return place

    def read(self, kept: Kept) -> np.ndarray:
        """Return an array."""
        if not isinstance(kept, Place):
            return kept
        assert self._file is not None
        array = np.empty(kept.shape, kept.dtype)
        self._file.seek(kept.offset)
        count = self._file.readinto(array.reshape(-1).view(np.uint8).data)  # type: ignore[attr-defined]
        if count != array.nbytes:
            raise OSError(f"a temporary file gave {count} of {array.nbytes} bytes")
        return array


class Stored(MutableMapping[str, np.ndarray]):
    """Arrays by name, in float64 when they are read, whatever they were."""

    def __init__(self, arrays: Iterable[tuple[str, np.ndarray]] = ()) -> None:
        self._shelf = Shelf()
        self._kept: dict[str, Kept] = {}
        self.update(arrays)

    def __setitem__(self, name: str, array: np.ndarray) -> None:
        self._kept[name] = self._shelf.keep(array)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._shelf.read(self._kept[name]).astype(np.float64, copy=False)

    def __delitem__(self, name: str) -> None:
        del self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)


class Computed(Mapping[str, np.ndarray]):
    """Arrays by name, computed each time that they are read."""

    def __init__(self, arrays: Mapping[str, Callable[[], np.ndarray]]) -> None:
        self._arrays = arrays

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]()

    def __or__(self, others: Mapping[str, np.ndarray]) -> "Computed":
        return Computed({**self._arrays, **{name: partial(others.__getitem__, name) for name in others}})

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)
