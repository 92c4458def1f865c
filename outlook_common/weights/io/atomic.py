"""Files and folders that are replaced whole or not at all."""

import ctypes
import errno
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from outlook_common.weights.errors import WeightsError

fcntl: Any  # Windows has none: what is left behind there is not swept up
try:
    import fcntl
except ImportError:
    fcntl = None

_RENAME_EXCHANGE, _AT_FDCWD = 2, -100


@contextmanager
def replacing(path: Path, *, is_ours: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Yield an empty hidden file (or folder) beside `path`, which replaces it once the block ends without error.

    Killed at any moment, `path` is as it was or whole and new. What is then left behind is hidden, ends in ".tmp", and
    is removed by the next one that writes `path`.

    Args:
        path: what to replace, if it is there.
        is_ours: None for a file; for a folder, whether a folder that stands there may be replaced.

    Raises:
        WeightsError: what stands there is not to be replaced: a symbolic link, a device, somebody's folder.
        OSError: it cannot be written.
    """
    _check_destination(path, is_ours)
    _sweep(path)
    temporary, lock = _create(path, is_folder=is_ours is not None)
    try:
        yield temporary
        sync(temporary)
        _check_destination(path, is_ours)  # once more: minutes may have passed
        if is_ours is None:
            if path.exists():
                shutil.copymode(path, temporary)
            temporary.replace(path)
        else:
            _replace_folder(temporary, path)
        sync_folder(path.parent)
    finally:
        remove(temporary)
        os.close(lock)


def sync(path: Path) -> None:
    """Bring a file, or a folder with all that is in it, to the disk."""
    if not path.is_dir():
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return
    for part in path.iterdir():
        sync(part)
    sync_folder(path)


def sync_folder(folder: Path) -> None:
    """Bring the list of a folder's files to the disk."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows has no such thing
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _check_destination(path: Path, is_ours: Callable[[Path], bool] | None) -> None:
    if path.is_symlink():
        raise WeightsError(f"{path}: a symbolic link to {path.readlink()}; give the path of what is to be written")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    if not path.exists():
        return
    if is_ours is None and not path.is_file():
        raise WeightsError(f"{path}: a {'folder' if path.is_dir() else 'device'}, expected a file or nothing there")
    if is_ours is not None and not (path.is_dir() and is_ours(path)):
        raise WeightsError(f"{path}: it is there and is no checkpoint of this kind, so it is not replaced")


def _create(path: Path, *, is_folder: bool) -> tuple[Path, int]:
    """Return a new file or folder and a descriptor that keeps it locked."""
    while True:
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        if is_folder:
            temporary.mkdir()
            try:
                descriptor = os.open(temporary, os.O_RDONLY)
            except FileNotFoundError:  # another process took it for an orphan
                continue
        else:
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if _lock(descriptor) and temporary.exists():
            return temporary, descriptor
        os.close(descriptor)  # likewise, before it was locked


def _lock(descriptor: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def _sweep(path: Path) -> None:
    """Remove what processes that were killed while writing `path` left behind; those alive hold a lock."""
    if fcntl is None:
        return
    orphan = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{32}\.tmp")
    for found in [entry for entry in path.parent.iterdir() if orphan.fullmatch(entry.name)]:
        with suppress(OSError):
            descriptor = os.open(found, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(found)
            finally:
                os.close(descriptor)


def _replace_folder(new: Path, path: Path) -> None:
    """Put one folder in the place of another in a single step; the old one is then called `new`."""
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    while True:
        try:
            new.rename(path)  # over nothing, or over an empty folder
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if exchange is None:
            raise WeightsError(
                f"{path}: it is there, and this system cannot replace a folder in one step; remove it first"
            )
        if exchange(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(path), _RENAME_EXCHANGE) == 0:
            return
        if (number := ctypes.get_errno()) != errno.ENOENT:  # else it has been removed meanwhile
            raise OSError(number, os.strerror(number), str(path))
