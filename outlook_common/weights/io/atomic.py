"""Atomic replacement of files and folders."""

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
from typing import TYPE_CHECKING

from outlook_common.weights.errors import WeightsError

if TYPE_CHECKING:
    from filelock import FileLock

_LOCK = ".lock"
# How many names are tried for a temporary file until one can be locked.
_NAMES = 9
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100


@contextmanager
def replacing(path: Path, *, is_replaceable: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Yield an empty hidden file or folder beside `path` that replaces it once the block ends without error.

    If the process is killed, `path` is unchanged or completely new. A hidden file ending in ".tmp" and its ".lock" may
    be left; the next write to `path` removes them.

    Args:
        path: to create or replace.
        is_replaceable: None for a file; for a folder, whether an existing one may be replaced.

    Raises:
        WeightsError: `path` is not replaced: a symbolic link, a device, another kind of folder.
        OSError: it cannot be written.
    """
    _check_destination(path, is_replaceable)
    _remove_leftovers(path)
    with _temporary(path, is_folder=is_replaceable is not None) as temporary:
        yield temporary
        sync(temporary)
        _check_destination(path, is_replaceable)  # once more: minutes may have passed
        if is_replaceable is None:
            if path.exists():
                shutil.copymode(path, temporary)
            temporary.replace(path)
        else:
            _replace_folder(temporary, path)
        sync_folder(path.parent)


def sync(path: Path) -> None:
    """Fsync a file, or a folder with everything in it."""
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
    """Fsync the entries of a folder."""
    if not hasattr(os, "O_DIRECTORY"):  # not on Windows
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, or a folder with everything in it, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _check_destination(path: Path, is_replaceable: Callable[[Path], bool] | None) -> None:
    if path.is_symlink():
        raise WeightsError(f"{path}: a symbolic link to {path.readlink()}; pass the path of the file itself")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    if not path.exists():
        return
    if is_replaceable is None and not path.is_file():
        raise WeightsError(f"{path}: a {'folder' if path.is_dir() else 'device'}, expected a file or an unused path")
    if is_replaceable is not None and not (path.is_dir() and is_replaceable(path)):
        raise WeightsError(f"{path}: exists and is not a checkpoint of this kind, so it is not replaced")


@contextmanager
def _temporary(path: Path, *, is_folder: bool) -> Iterator[Path]:
    """Yield a new, locked file or folder, which is removed in the end, whatever comes in between."""
    lock = _lock_of_new(path)  # before the file exists, so that no other process finds it unlocked
    temporary = Path(lock.lock_file.removesuffix(_LOCK))
    try:
        if is_folder:
            temporary.mkdir()
        else:
            temporary.touch(exist_ok=False)
        yield temporary
    finally:
        remove(temporary)
        _remove_lock(lock)


def _lock_of_new(path: Path) -> "FileLock":
    """Return the lock of a new temporary file's name, held unless there can be none."""
    from filelock import Timeout

    for _ in range(_NAMES):
        lock = _lock_of(path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp"))
        try:
            lock.acquire()
        except Timeout:  # another process takes it for a leftover, or nothing can be written there
            continue
        except (NotImplementedError, OSError):  # a file system without locks
            break
        if Path(lock.lock_file).exists():
            break
        lock.release()  # that process has removed it just before
    return lock


def _lock_of(temporary: Path) -> "FileLock":
    """Return the lock beside a temporary file, which its process holds while it lives."""
    from filelock import FileLock

    return FileLock(f"{temporary}{_LOCK}", timeout=0)


def _remove_lock(lock: "FileLock") -> None:
    """Release a lock and remove its file; where a file that is open can be removed, in this order no one finds it."""
    with suppress(OSError):
        Path(lock.lock_file).unlink()
    lock.release()
    with suppress(OSError):
        Path(lock.lock_file).unlink()


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files of killed processes that wrote `path`; living ones hold their locks."""
    leftover = re.compile(rf"({re.escape(f'.{path.name}.')}[0-9a-f]{{32}}\.tmp)(?:{re.escape(_LOCK)})?")
    found = {match[1] for entry in path.parent.iterdir() if (match := leftover.fullmatch(entry.name))}
    for temporary in map(path.with_name, found):
        lock = _lock_of(temporary)
        with suppress(NotImplementedError, OSError):
            lock.acquire()
            remove(temporary)
            _remove_lock(lock)


def _replace_folder(new: Path, path: Path) -> None:
    """Exchange two folders in one step; the old one is then called `new`."""
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    while True:
        try:
            new.rename(path)  # over nothing, or over an empty folder
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if exchange is None:
            raise WeightsError(f"{path}: exists, and this system cannot replace a folder in one step; remove it first")
        if exchange(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(path), _RENAME_EXCHANGE) == 0:
            return
        if (number := ctypes.get_errno()) != errno.ENOENT:  # ENOENT: removed meanwhile
            raise OSError(number, os.strerror(number), str(path))
