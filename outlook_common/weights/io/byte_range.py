"""Byte ranges of files, stored or deflated, with CRC-32; files that change while read are an error.

No memory map: its pages would accumulate, and a file truncated meanwhile would kill the process.
"""

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from outlook_common.weights.errors import WeightsError

_PACKED_BYTES = 1 << 18  # of deflated input read at a time


@dataclass(frozen=True)
class UnchangedFile:
    """A file that must stay as it was when first looked at."""

    path: Path
    size: int
    identity: tuple[int, int, int]

    @classmethod
    def at(cls, path: Path) -> "UnchangedFile":
        """Return the file in its present state."""
        status = path.stat()
        return cls(path, status.st_size, _identity(status))

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Open it for reading.

        Raises:
            WeightsError: it was replaced or written to since, or until the end of the block.
        """
        with self.path.open("rb", buffering=0) as file:
            self._check(file)
            yield file
            self._check(file)

    def _check(self, file: IO[bytes]) -> None:
        if _identity(os.fstat(file.fileno())) != self.identity:
            raise WeightsError(f"{self.path}: it was changed while it was being read")


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class ByteRange:
    """Consecutive bytes of a file.

    Attributes:
        file: the file.
        offset: of the first byte.
        size: in bytes, as stored.
        deflated: whether they are packed by raw deflate.
        skip: unpacked bytes before the first wanted one.
        crc: CRC-32 of all unpacked bytes; None if unknown.
    """

    file: UnchangedFile
    offset: int
    size: int
    deflated: bool = False
    skip: int = 0
    crc: int | None = None

    @contextmanager
    def open(self) -> Iterator["Stream"]:
        """Open it for reading at its first wanted byte."""
        with self.file.open() as file:
            file.seek(self.offset)
            stream = Stream(file, self)
            stream.fill(np.empty(self.skip, np.uint8))
            yield stream


class Stream:
    """The unpacked bytes of a byte range, read sequentially."""

    def __init__(self, file: IO[bytes], byte_range: ByteRange) -> None:
        self._file = file
        self._byte_range = byte_range
        self._left = byte_range.size
        self._inflate = zlib.decompressobj(-zlib.MAX_WBITS) if byte_range.deflated else None
        self._crc = 0

    def fill(self, buffer: np.ndarray) -> None:
        """Fill `buffer` with the next bytes.

        Raises:
            WeightsError: there are fewer, or they cannot be unpacked.
        """
        view, done = buffer.data, 0
        while done < len(view):
            count = self._read_stored(view[done:]) if self._inflate is None else self._read_inflated(view[done:])
            if count == 0:
                raise self._damaged(f"it ends {len(view) - done} bytes too early")
            done += count
        if self._byte_range.crc is not None:
            self._crc = zlib.crc32(view, self._crc)

    def finish(self) -> None:
        """Check that no bytes are left and that the CRC-32, if known, is right.

        Raises:
            WeightsError: otherwise.
        """
        rest = np.empty(1, np.uint8)
        if (self._read_stored(rest.data) if self._inflate is None else self._read_inflated(rest.data)) > 0:
            raise self._damaged("it has more bytes than its shape")
        if self._byte_range.crc is not None and self._crc != self._byte_range.crc:
            raise self._damaged(f"its CRC-32 is {self._crc:08x}, expected {self._byte_range.crc:08x}")

    def _read_stored(self, view: memoryview) -> int:
        count: int = self._file.readinto(view[: self._left]) if self._left else 0  # type: ignore[attr-defined]
        self._left -= count
        return count

    def _read_inflated(self, view: memoryview) -> int:
        assert self._inflate is not None
        try:
            while not self._inflate.eof:
                packed = self._inflate.unconsumed_tail
                if not packed:
                    packed = self._file.read(min(_PACKED_BYTES, self._left))
                    self._left -= len(packed)
                found = self._inflate.decompress(packed, len(view))
                if found:
                    view[: len(found)] = found
                    return len(found)
                if not packed:
                    break
        except zlib.error as error:
            raise self._damaged(str(error)) from error
        return 0

    def _damaged(self, what: str) -> WeightsError:
        return WeightsError(f"{self._byte_range.file.path}: damaged at byte {self._byte_range.offset}: {what}")
