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
from typing import Any

from outlook_common.weights.errors import WeightsError

fcntl: Any  # not on Windows, where files left by killed processes are not removed
try:
    import fcntl
except ImportError:
    fcntl = None

_RENAME_EXCHANGE, _AT_FDCWD = 2, -100


@contextmanager
def replacing(path: Path, *, is_replaceable: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Yield an empty hidden file or folder beside `path` that replaces it once the block ends without error.

    If the process is killed, `path` is unchanged or completely new. A hidden file ending in ".tmp" may be left; the
    next write to `path` removes it.

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
    is_made = False
    while not is_made:
        temporary, descriptor = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp"), None
        try:
            if is_folder:
                temporary.mkdir()
                with suppress(FileNotFoundError):  # removed by another process as a leftover
                    descriptor = os.open(temporary, os.O_RDONLY)
            else:
                descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            # Another process may also have removed it before the lock.
            if is_made := descriptor is not None and _lock(descriptor) and temporary.exists():
                yield temporary
        finally:
            remove(temporary)
            if descriptor is not None:
                os.close(descriptor)


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


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files of killed processes that wrote `path`; living ones hold a lock."""
    if fcntl is None:
        return
    leftover = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{32}\.tmp")
    for found in [entry for entry in path.parent.iterdir() if leftover.fullmatch(entry.name)]:
        with suppress(OSError):
            descriptor = os.open(found, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(found)
            finally:
                os.close(descriptor)


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
