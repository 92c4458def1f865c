"""Files and folders of named tensors: which format a path has, reading, and writing whole or not at all."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from outlook_common.text import listed
from outlook_common.weights.errors import WeightsError
from outlook_common.weights.formats import npz, orbax, pytorch, safetensors, sharded
from outlook_common.weights.formats.base import Contents, Format, Metadata, PathLike, Places, Tensors
from outlook_common.weights.io.atomic import replacing, sync
from outlook_common.weights.io.lazy import LazyTensor, same_bytes, stored
from outlook_common.weights.io.prefetch import blocks_ahead

__all__ = ["FORMATS", "Contents", "PathLike", "format_of", "open_file", "read_arrays", "write_arrays", "write_tensors"]

Progress = Callable[[int], None]

# By what a path ends in; the first that fits counts.
FORMATS: dict[str, Format] = {
    ".safetensors.index.json": sharded.FORMAT,
    ".safetensors": safetensors.FORMAT,
    ".npz": npz.FORMAT,
    ".pth": pytorch.FORMAT,
    ".pt": pytorch.FORMAT,
    ".pth.tar": pytorch.FORMAT,
    ".bin": pytorch.FORMAT,
    ".ckpt": pytorch.FORMAT,  # of Lightning's
    ".orbax": orbax.FORMAT,
}


def format_of(path: PathLike) -> Format:
    """Return the format that the suffix of `path` names; a folder that Orbax saved may have any name.

    Raises:
        WeightsError: the suffix is unknown; the message lists those known.
    """
    name = Path(path).name.lower()
    if Path(path).is_dir() and orbax.is_orbax(Path(path)):
        return orbax.FORMAT
    for suffix, file_format in FORMATS.items():
        if name.endswith(suffix):
            return file_format
    raise WeightsError(f"{path}: unknown suffix of a weight file; known: {', '.join(FORMATS)}")


def open_file(path: PathLike) -> Contents:
    """Return what a file or an Orbax folder holds; numbers are read later, as far as the format allows.

    Nothing in it is executed.

    Raises:
        WeightsError: the suffix is unknown, or the file is not what its suffix says, or damaged, or made to harm, or
            would have to be executed to be read.
        OSError: the file cannot be opened.
        ImportError: the format needs a framework that is not installed.
    """
    file_format = format_of(path)
    if file_format.is_ours is None and Path(path).exists() and not Path(path).is_file():
        raise WeightsError(f"{path}: not a file")  # of a device nobody knows where it ends
    return file_format.read(Path(path))


def read_arrays(path: PathLike) -> dict[str, Any]:
    """Return what a file holds: {name: NumPy array}; from PyTorch's, as it was saved, tensors and wrappers alike.

    Raises:
        WeightsError, OSError, ImportError: as `open_file` says.
    """
    values = open_file(path).values
    return {name: value.read() if isinstance(value, LazyTensor) else value for name, value in values.items()}


def write_arrays(path: PathLike, arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write a file, whole or not at all: what stood there is replaced once the new one is read back equal, bit by bit.

    Args:
        path: its suffix decides the format.
        arrays: by name; NumPy's, PyTorch's or JAX's.
        metadata: kept by the formats that have a place for it, all but PyTorch's.

    Raises:
        WeightsError: the suffix is unknown, what stands there is not to be replaced, or what was read back differs.
        TypeError: something is not an array of numbers.
        OSError: the file cannot be written.
        ImportError: the format needs a framework that is not installed.
    """
    tensors = {name: stored(array) for name, array in arrays.items()}
    write_tensors(Path(path), format_of(path), tensors, metadata or {})


def write_tensors(
    path: Path, file_format: Format, tensors: Tensors, metadata: Metadata, progress: Progress | None = None
) -> None:
    """Do what `write_arrays` does, a few blocks of numbers at a time where the format allows.

    Args:
        path: where to.
        file_format: what to write there.
        tensors: by name; each is read once, twice where the format does not compare as it writes.
        metadata: see `write_arrays`; may still be under way.
        progress: called with the number of bytes each time some have been read of the tensors.

    Raises:
        WeightsError, OSError, ImportError: as `write_arrays` says, and whatever reading the tensors raises.
    """
    report = progress or (lambda done: None)
    counted = {name: _Counted(tensor, report) for name, tensor in tensors.items()}
    with replacing(path, is_ours=file_format.is_ours) as temporary, ThreadPoolExecutor(1) as disk:
        places = file_format.write(temporary, counted, metadata)
        syncing = disk.submit(sync, temporary)  # the disk writes what is compared meanwhile
        _check_written(file_format.read(temporary).values, counted, places, path)
        syncing.result()


class _Counted(LazyTensor):
    """A tensor that reports how much of it is read, and knows how much of it was given away in blocks."""

    def __init__(self, tensor: LazyTensor, report: Progress) -> None:
        super().__init__(tensor.dtype, tensor.shape)
        self._tensor = tensor
        self._report = report
        self.given = 0

    def read(self) -> Any:
        self._report(self.nbytes)
        return self._tensor.read()

    def blocks(self) -> Any:
        for block in self._tensor.blocks():
            self._report(len(block))
            self.given += len(block)
            yield block


def _check_written(found: Mapping[str, Any], expected: Mapping[str, _Counted], places: Places, path: Path) -> None:
    """Raise a WeightsError unless all of `expected`, and nothing else, is found, with the same bits.

    Known to have them is what was read again as it was written, if all of it was and the reader finds it at that place.
    """
    differing = [
        name
        for name, tensor in expected.items()
        if name not in found or (stored(found[name]).dtype, tuple(found[name].shape)) != (tensor.dtype, tensor.shape)
    ]
    if not differing and len(found) == len(expected):
        known = {name for name in places if expected[name].given == expected[name].nbytes}
        unknown = [name for name in expected if name not in known or stored(found[name]).place != places[name]]
        blocks = blocks_ahead(expected[name] for name in unknown)
        for name in unknown:
            same = [same_bytes(there, next(blocks)) for there in stored(found[name]).blocks()]
            if not all(same):
                differing.append(name)
        for _ in blocks:
            raise AssertionError("a tensor has more bytes than its shape")
    if differing or len(found) != len(expected):
        raise WeightsError(
            f"{path}: not written, what was read back differs: {len(found)} tensors of {len(expected)}, "
            f"and other bits in {listed(differing)}"
        )
