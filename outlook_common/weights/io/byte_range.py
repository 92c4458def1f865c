"""Parts of files: where bytes lie, and how they are packed. Read without a memory map, whose pages would pile up."""

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from outlook_common.weights.errors import WeightsError

_PACKED = 1 << 18  # bytes of packed input that are read at a time


@dataclass(frozen=True)
class KnownFile:
    """A file as it was when it was first looked at."""

    path: Path
    size: int
    identity: tuple[int, int, int]

    @classmethod
    def look(cls, path: Path) -> "KnownFile":
        """Return what the file is now."""
        status = path.stat()
        return cls(path, status.st_size, _identity(status))

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Open it for reading.

        Raises:
            WeightsError: it is another file by now, or has been written to, or is at the end of the block.
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
        file: which.
        offset: of the first byte.
        size: how many bytes, as they lie in the file.
        deflated: whether they are packed by zlib's raw deflate.
        skip: how many of the unpacked bytes come before those that are wanted.
        crc: CRC-32 of all unpacked bytes, or None where there is none.
    """

    file: KnownFile
    offset: int
    size: int
    deflated: bool = False
    skip: int = 0
    crc: int | None = None

    @contextmanager
    def open(self) -> Iterator["Stream"]:
        """Open it for reading from its first wanted byte on."""
        with self.file.open() as file:
            file.seek(self.offset)
            stream = Stream(file, self)
            stream.fill(np.empty(self.skip, np.uint8))
            yield stream


class Stream:
    """The unpacked bytes of an byte_range, one after another."""

    def __init__(self, file: IO[bytes], byte_range: ByteRange) -> None:
        self._file = file
        self._extent = byte_range
        self._left = byte_range.size
        self._inflate = zlib.decompressobj(-zlib.MAX_WBITS) if byte_range.deflated else None
        self._crc = 0

    def fill(self, buffer: np.ndarray) -> None:
        """Read as many bytes as `buffer` has.

        Raises:
            WeightsError: there are fewer, or they cannot be unpacked.
        """
        view, done = buffer.data, 0
        while done < len(view):
            count = self._stored(view[done:]) if self._inflate is None else self._inflated(view[done:])
            if count == 0:
                raise self._damaged(f"it ends {len(view) - done} bytes too early")
            done += count
        if self._extent.crc is not None:
            self._crc = zlib.crc32(view, self._crc)

    def finish(self) -> None:
        """Check that nothing is left and that the checksum, if there is one, is right.

        Raises:
            WeightsError: otherwise.
        """
        rest = np.empty(1, np.uint8)
        if (self._stored(rest.data) if self._inflate is None else self._inflated(rest.data)) > 0:
            raise self._damaged("there are more bytes than its shape has")
        if self._extent.crc is not None and self._crc != self._extent.crc:
            raise self._damaged(f"its CRC-32 is {self._crc:08x}, expected {self._extent.crc:08x}")

    def _stored(self, view: memoryview) -> int:
        count: int = self._file.readinto(view[: self._left]) if self._left else 0  # type: ignore[attr-defined]
        self._left -= count
        return count

    def _inflated(self, view: memoryview) -> int:
        assert self._inflate is not None
        try:
            while not self._inflate.eof:
                packed = self._inflate.unconsumed_tail
                if not packed:
                    packed = self._file.read(min(_PACKED, self._left))
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
        return WeightsError(f"{self._extent.file.path}: damaged at byte {self._extent.offset}: {what}")
