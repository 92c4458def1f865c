"""Select the format of a path; read it, or write it atomically and verified."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from outlook_common.text import closest, listed
from outlook_common.weights.errors import WeightsError
from outlook_common.weights.formats import beside, dcp, hdf5, msgpack, npz, orbax, pytorch, safetensors, sharded
from outlook_common.weights.formats.base import Contents, Format, Metadata, PathLike, Positions, Tensors
from outlook_common.weights.io.atomic import replacing, sync
from outlook_common.weights.io.lazy import LazyTensor, as_lazy, same_bytes
from outlook_common.weights.io.prefetch import prefetch_blocks

__all__ = ["FORMATS", "PathLike", "format_of", "open_file", "read_arrays", "write_arrays", "write_tensors"]

Progress = Callable[[int], None]

# Suffix -> format; the first match counts.
FORMATS: dict[str, Format] = {
    ".safetensors.index.json": sharded.FORMAT,
    ".bin.index.json": sharded.FORMAT,
    ".safetensors": safetensors.FORMAT,
    ".npz": npz.FORMAT,
    ".pth": pytorch.FORMAT,
    ".pt": pytorch.FORMAT,
    ".pth.tar": pytorch.FORMAT,
    ".bin": pytorch.FORMAT,
    ".ckpt": pytorch.FORMAT,  # Lightning's
    ".msgpack": msgpack.FORMAT,
    ".h5": hdf5.FORMAT,
    ".hdf5": hdf5.FORMAT,
    ".orbax": orbax.FORMAT,
    ".dcp": dcp.FORMAT,
}


def format_of(path: PathLike) -> Format:
    """Return the format of a path by its suffix; an existing folder of Orbax's or DCP's may have any name.

    Raises:
        WeightsError: the suffix is unknown; the message lists the known ones.
    """
    name = Path(path).name.lower()
    if Path(path).is_dir() and orbax.is_orbax(Path(path)):
        return orbax.FORMAT
    if Path(path).is_dir() and dcp.is_dcp(Path(path)):
        return dcp.FORMAT
    for suffix, file_format in FORMATS.items():
        if name.endswith(suffix):
            return file_format
    near = closest(Path(name).suffix, FORMATS)
    hint = f"did you mean {near}? Known" if near else "known"
    raise WeightsError(f"{path}: unknown suffix of a weight file; {hint}: {', '.join(FORMATS)}")


def open_file(path: PathLike) -> Contents:
    """Open a file, or a folder of Orbax's or DCP's; numbers are read later where the format allows.

    Executes nothing in it.

    Raises:
        WeightsError: the suffix is unknown, or the file is of another format, damaged, hostile, or contains code.
        OSError: the file cannot be opened.
        ImportError: the format needs a framework that is not installed.
    """
    file_format = format_of(path)
    if file_format.is_replaceable is None and Path(path).exists() and not Path(path).is_file():
        raise WeightsError(f"{path}: not a file")  # devices and pipes may never end
    contents = file_format.read(Path(path))
    return replace(contents, metadata=beside.read(Path(path))) if file_format.metadata_beside else contents


def read_arrays(path: PathLike) -> dict[str, Any]:
    """Read a file: {name: NumPy array}; PyTorch's files and folders as they were saved, with tensors and wrappers.

    Raises:
        WeightsError, OSError, ImportError: as `open_file` says.
    """
    return _read(open_file(path).values)


def _read(values: Mapping[Any, Any]) -> dict[Any, Any]:
    read = {name: value.read() if isinstance(value, LazyTensor) else value for name, value in values.items()}
    return {name: _read(value) if isinstance(value, dict) else value for name, value in read.items()}


def write_arrays(path: PathLike, arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write a file atomically; an existing one is replaced once the new one has been read back bit for bit.

    Args:
        path: its suffix selects the format.
        arrays: by name; NumPy's, PyTorch's or JAX's.
        metadata: stored by all formats; of `.msgpack` in a file of their own, `….msgpack.outlook.json`.

    Raises:
        WeightsError: the suffix is unknown, what is at `path` may not be replaced, or what was read back differs.
        TypeError: a value is not a numeric array.
        OSError: the file cannot be written.
        ImportError: the format needs a framework that is not installed.
    """
    tensors = {name: as_lazy(array) for name, array in arrays.items()}
    write_tensors(Path(path), format_of(path), tensors, metadata or {})


def write_tensors(
    path: Path, file_format: Format, tensors: Tensors, metadata: Metadata, progress: Progress | None = None
) -> None:
    """Do what `write_arrays` does, streaming blocks of numbers where the format allows.

    Args:
        path: to write.
        file_format: of the file or folder.
        tensors: by name; each is read once, or twice if the format does not verify itself.
        metadata: see `write_arrays`; values may be pending.
        progress: called with the number of bytes after each read.

    Raises:
        WeightsError, OSError, ImportError: as `write_arrays` says, and any error of reading the tensors.
    """
    report = progress or (lambda done: None)
    counted = {name: _Counted(tensor, report) for name, tensor in tensors.items()}
    with ExitStack() as stack:
        own = stack.enter_context(replacing(beside.beside(path))) if file_format.metadata_beside and metadata else None
        with replacing(path, is_replaceable=file_format.is_replaceable) as temporary, ThreadPoolExecutor(1) as disk:
            verified = file_format.write(temporary, counted, metadata)
            syncing = disk.submit(sync, temporary)  # to disk while the file is being verified
            _verify(file_format.read(temporary).values, counted, verified, path)
            syncing.result()
            if own is not None:
                beside.write(own, temporary, metadata)
    if file_format.metadata_beside and not metadata:
        beside.beside(path).unlink(missing_ok=True)


class _Counted(LazyTensor):
    """A tensor that reports bytes read, and counts bytes streamed in blocks."""

    def __init__(self, tensor: LazyTensor, report: Progress) -> None:
        super().__init__(tensor.dtype, tensor.shape)
        self._tensor = tensor
        self._report = report
        self.streamed = 0

    def read(self) -> Any:
        self._report(self.nbytes)
        return self._tensor.read()

    def blocks(self) -> Any:
        for block in self._tensor.blocks():
            self._report(len(block))
            self.streamed += len(block)
            yield block


def _verify(found: Mapping[str, Any], expected: Mapping[str, _Counted], verified: Positions, path: Path) -> None:
    """Raise a WeightsError unless `found` is exactly `expected`, bit for bit.

    Tensors verified as they were written count as equal if they were streamed completely and are found at the position
    where they were written; all others are read again.
    """
    differing = [
        name
        for name, tensor in expected.items()
        if name not in found or (as_lazy(found[name]).dtype, tuple(found[name].shape)) != (tensor.dtype, tensor.shape)
    ]
    if not differing and len(found) == len(expected):
        complete = {name for name in verified if expected[name].streamed == expected[name].nbytes}
        unverified = [
            name for name in expected if name not in complete or as_lazy(found[name]).position != verified[name]
        ]
        blocks = prefetch_blocks(expected[name] for name in unverified)
        for name in unverified:
            same = [same_bytes(block, next(blocks)) for block in as_lazy(found[name]).blocks()]
            if not all(same):
                differing.append(name)
        for _ in blocks:
            raise AssertionError("a tensor has more bytes than its shape")
    if differing or len(found) != len(expected):
        raise WeightsError(
            f"{path}: not written, what was read back differs: {len(found)} tensors of {len(expected)}, "
            f"and other bits in {listed(differing)}"
        )
