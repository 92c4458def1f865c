"""Members of a ZIP archive as byte ranges, after checking the archive as a whole; numbers are read later."""

import io
import struct
import zipfile
from typing import IO, Any

from outlook_common.text import printable
from outlook_common.weights.formats.base import check_names
from outlook_common.weights.io import limits
from outlook_common.weights.io.byte_range import ByteRange, UnchangedFile

_UTF8 = 0x800
# Accepted flags of members: deflate level, position of sizes, encoding of names. Not encryption.
_FLAGS = 0x6 | 0x8 | _UTF8
# A member's local header: its size without name and extra field, and the lengths of those two.
_LOCAL_BYTES, _LOCAL_LENGTHS = 30, struct.Struct("<26x2H")
_LOCAL_MAGIC = b"PK\3\4"


class Section(io.RawIOBase):
    """Part of an open file, as a file; an archive may lie in the middle of one."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"position {base + offset} is before the first byte")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as the part goes."""
        view = memoryview(buffer).cast("B")
        view = view[: max(self._size - self._at, 0)]
        self._file.seek(self._start + self._at)
        count: int = self._file.readinto(view) if len(view) else 0  # type: ignore[attr-defined]
        self._at += count
        return count


def members(
    file: UnchangedFile, start: int = 0, size: int | None = None, *, suffix: str = ""
) -> dict[str, tuple[ByteRange, int]]:
    """Return each member's byte range in the file and its unpacked size.

    Args:
        file: that holds the archive.
        start: of the archive in it.
        size: of the archive; None for the rest of the file.
        suffix: removed from names.

    Raises:
        ValueError: members overlap, are encrypted, patched or packed in other ways than deflate, or are a ZIP bomb.
        zipfile.BadZipFile: it is no archive.
        WeightsError: too many names, or a name that is there twice.
    """
    size = file.size - start if size is None else size
    with file.open() as opened:
        section = io.BufferedReader(Section(opened, start, size))
        with zipfile.ZipFile(section) as archive:
            infos = archive.infolist()
            names = [info.filename.removesuffix(suffix) for info in infos]
            check_names(file.path, names)
            _check_sizes(infos, size)
            return {
                name: (_byte_range_of(file, section, info, start), info.file_size)
                for name, info in zip(names, infos, strict=True)
            }


def _check_sizes(infos: list[zipfile.ZipInfo], size: int) -> None:
    at = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset < at:
            raise ValueError(f"{printable(info.filename)} overlaps the member before it")
        at = info.header_offset + _LOCAL_BYTES + info.compress_size
    if at > size:
        raise ValueError(f"its members end at byte {at}, the file at {size}")
    unpacked = sum(info.file_size for info in infos)
    if unpacked > max(limits.UNPACKED_BYTES, limits.UNPACKED_RATIO * size):
        raise ValueError(
            f"its {size} bytes unpack to {unpacked}, more than {limits.UNPACKED_RATIO} times as many: a ZIP bomb?"
        )


def _byte_range_of(file: UnchangedFile, section: Any, info: zipfile.ZipInfo, start: int) -> ByteRange:
    if info.flag_bits & ~_FLAGS:
        raise ValueError(f"{printable(info.filename)} is encrypted or patched: flags {info.flag_bits:#x}")
    if info.volume:
        raise ValueError(f"{printable(info.filename)} is said to be on another disk, number {info.volume}")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{printable(info.filename)} is packed by method {info.compress_type}, only 0 and 8 are read")
    if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
        raise ValueError(f"{printable(info.filename)} is {info.file_size} bytes long, {info.compress_size} are there")
    section.seek(info.header_offset)
    header = section.read(_LOCAL_BYTES)
    if not header.startswith(_LOCAL_MAGIC) or len(header) < _LOCAL_BYTES:
        raise ValueError(f"{printable(info.filename)} is not where the archive says")
    name_length, extra_length = _LOCAL_LENGTHS.unpack(header)
    own_name = section.read(name_length).decode("utf-8" if info.flag_bits & _UTF8 else "cp437")
    if own_name != info.orig_filename:
        raise ValueError(f"{printable(info.filename)} is called {printable(own_name)} in its own header")
    first = start + info.header_offset + _LOCAL_BYTES + name_length + extra_length
    deflated = info.compress_type == zipfile.ZIP_DEFLATED
    return ByteRange(file, first, info.compress_size, deflated, crc=info.CRC)
