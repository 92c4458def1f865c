"""A file that is read again as it is written: what does not come back with the same bits is an error."""

import os
from io import FileIO, RawIOBase
from pathlib import Path
from typing import Any

from outlook_common.weights.errors import WeightsError

# Bytes after which the disk is asked to begin: it then has little left to do at the end.
_BEGUN = 1 << 25


class VerifiedFile(RawIOBase):
    """A file open for writing. It must be empty: nothing is read but what was written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = FileIO(path, "r+")
        self._back = bytearray()
        self._begun = 0

    def writable(self) -> bool:
        """Whether it can be written to: yes."""
        return True

    def seekable(self) -> bool:
        """Whether it has places to go to: yes."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Return the place."""
        return self._file.tell()

    def write(self, data: Any) -> int:
        """Write all of `data`, read it again, and compare every bit.

        Raises:
            WeightsError: something else was read.
            OSError: it cannot be written or read.
        """
        view = memoryview(data).cast("B")
        start, done = self._file.tell(), 0
        while done < len(view):
            done += self._file.write(view[done:])
        self._file.seek(start)
        if len(self._back) != len(view):
            self._back = bytearray(len(view))
        back, done = memoryview(self._back), 0
        while done < len(view):
            count = self._file.readinto(back[done:])
            if count == 0:
                break
            done += count
        # A `bytearray` compares as memory, a `memoryview` number by number, which takes seventy times as long.
        if done < len(view) or self._back != view:
            raise WeightsError(f"{self._path}: not written, other bits were read back from byte {start} on")
        self._begin_syncing(start + done)
        return len(view)

    def _begin_syncing(self, end: int) -> None:
        """Have the disk begin with what lies before `end`, once that is enough to be worth it.

        Linux takes the advice that this will not be read soon so: it starts writing what is dirty, and waits for
        nothing. `fsync` in a thread would hold up those who write meanwhile, for the journal's sake.
        """
        if end - self._begun >= _BEGUN and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), self._begun, end - self._begun, os.POSIX_FADV_DONTNEED)
            self._begun = end

    def close(self) -> None:
        """Close it."""
        if not self.closed:
            self._file.close()
            super().close()
