"""A file that is read again as it is written: what does not come back with the same bits is an error."""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from io import FileIO, RawIOBase
from pathlib import Path
from typing import Any

import numpy as np

from outlook_common.weights.errors import WeightsError
from outlook_common.weights.stored import same_bytes

# Bytes after which the disk is asked to begin: it then has little left to do at the end.
_SYNCED = 1 << 27


class CheckedFile(RawIOBase):
    """A file open for writing. It must be empty: nothing is read but what was written."""

    def __init__(self, path: Path, disk: ThreadPoolExecutor) -> None:
        self._path = path
        self._file = FileIO(path, "r+")
        self._back = np.empty(0, np.uint8)
        self._disk = disk
        self._syncing: Future[None] | None = None
        self._unsynced = 0

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
        if self._back.size < len(view):
            self._back = np.empty(len(view), np.uint8)
        back, done = self._back[: len(view)], 0
        while done < len(view):
            count = self._file.readinto(back.data[done:])
            if count == 0:
                break
            done += count
        if done < len(view) or not same_bytes(back, np.frombuffer(view, np.uint8)):
            raise WeightsError(f"{self._path}: not written, other bits were read back from byte {start} on")
        self._begin_syncing(len(view))
        return len(view)

    def _begin_syncing(self, count: int) -> None:
        self._unsynced += count
        if self._unsynced >= _SYNCED and (self._syncing is None or self._syncing.done()):
            self._wait_for_disk()
            self._unsynced = 0
            self._syncing = self._disk.submit(os.fsync, self._file.fileno())

    def _wait_for_disk(self) -> None:
        if self._syncing is not None:
            self._syncing.result()

    def close(self) -> None:
        """Close it.

        Raises:
            OSError: the disk could not take what was written.
        """
        if not self.closed:
            try:
                self._wait_for_disk()
            finally:
                self._file.close()
                super().close()


@contextmanager
def checked(path: Path) -> Iterator[CheckedFile]:
    """Open an empty file for writing; what is written is read again at once, and brought to the disk meanwhile."""
    with ThreadPoolExecutor(1) as disk, CheckedFile(path, disk) as file:
        yield file
