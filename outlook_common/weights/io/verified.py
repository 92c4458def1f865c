"""A file that reads back and compares everything it writes."""

import os
from io import FileIO, RawIOBase
from pathlib import Path
from typing import Any

from outlook_common.weights.errors import WeightsError

# Bytes after which writing to disk is started, so that little is left at the end.
_FLUSH_BYTES = 1 << 25


class VerifiedFile(RawIOBase):
    """An empty file open for writing, with every write read back."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = FileIO(path, "r+")
        self._read_back = bytearray()
        self._flushed = 0

    def writable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Return the position."""
        return self._file.tell()

    def write(self, data: Any) -> int:
        """Write all of `data`, read it back and compare every bit.

        Raises:
            WeightsError: other bits were read back.
            OSError: it cannot be written or read.
        """
        view = memoryview(data).cast("B")
        start, done = self._file.tell(), 0
        while done < len(view):
            done += self._file.write(view[done:])
        self._file.seek(start)
        if len(self._read_back) != len(view):
            self._read_back = bytearray(len(view))
        read_back, done = memoryview(self._read_back), 0
        while done < len(view):
            count = self._file.readinto(read_back[done:])
            if count == 0:
                break
            done += count
        # Comparing a `bytearray` is 70 times faster than a `memoryview`, which compares number by number.
        if done < len(view) or self._read_back != view:
            raise WeightsError(f"{self._path}: not written, other bits were read back from byte {start} on")
        self._start_flush(start + done)
        return len(view)

    def _start_flush(self, end: int) -> None:
        """Start writing to disk what lies before `end`, once it is `_FLUSH_BYTES`; does not wait.

        On Linux POSIX_FADV_DONTNEED starts the writeback of dirty pages. `fsync` in a thread would block concurrent
        writes on the journal.
        """
        if end - self._flushed >= _FLUSH_BYTES and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), self._flushed, end - self._flushed, os.POSIX_FADV_DONTNEED)
            self._flushed = end

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            self._file.close()
            super().close()
