"""From one naming, layout and file format to another; bits stay as they are unless another dtype is asked for."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from outlook_common.arrays import DTYPES, cast, is_floating
from outlook_common.text import listed, printable
from outlook_common.weights.checkpoint import Checkpoint, Source, open_checkpoint
from outlook_common.weights.checksums import Line, manifest_of, source_sha256
from outlook_common.weights.errors import WeightsError
from outlook_common.weights.formats.base import Format
from outlook_common.weights.formats.registry import PathLike, format_of, write_tensors
from outlook_common.weights.formats.sharded import folder_of_shards
from outlook_common.weights.identify import LAYER, MODELS, Recognised, recognise, recognise_as
from outlook_common.weights.io.lazy import Computed, LazyTensor
from outlook_common.weights.match import plan
from outlook_common.weights.tables.base import FLAX, TORCH, WeightTable

# What other programs look for in the metadata of a .safetensors file.
_FORMAT = "format"
_FORMAT_OF_NAMING = {FLAX: "flax"}
# The metadata that are ours begin so; what else a source says of itself is kept.
_OURS = "outlook."
_FLOATS = ("float16", "bfloat16", "float32", "float64")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Conversion:
    """What was found in a file and what was written.

    Attributes:
        source: what was read.
        source_sha256: of the file's bytes, of several files' together; None for a mapping.
        destination: what was written.
        prefix: the part of the source that was read.
        model: what the tensors are of.
        sizes: of the model, as far as its tensors tell.
        found_naming: of the source.
        written_naming: of the destination.
        tensors: how many were written.
        dtypes: dtype -> how many tensors have it.
        missing: what the model has and the source has not, allowed by `allow_missing`.
        not_weights: names in the source of a model's random streams and rates of stochastic depth, left out.
        ignored: what the source has and the model has not, ignored by `ignore_unexpected`.
        manifest: a line per tensor that was written; None unless asked for.
    """

    source: str
    source_sha256: str | None
    destination: str
    prefix: str
    model: str
    sizes: dict[str, int | bool]
    found_naming: str
    written_naming: str
    tensors: int
    dtypes: dict[str, int]
    missing: tuple[str, ...]
    not_weights: tuple[str, ...]
    ignored: tuple[str, ...]
    manifest: tuple[Line, ...] | None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict that JSON can hold."""
        return asdict(self)


def convert(
    src: Source,
    dst: PathLike,
    *,
    model: str | None = None,
    to: str | None = None,
    prefix: str = "",
    dtype: str | None = None,
    use_ema: bool = False,
    allow_missing: bool = False,
    ignore_unexpected: bool = False,
    max_shard_size: int | None = None,
    manifest: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Convert the weights of a known model from one file to another.

    No framework is needed, but PyTorch for PyTorch's own files and JAX for Orbax's. Memory stays below the largest
    tensor and 200 MB, but for PyTorch's files.

    Args:
        src: a path, a Hub id or a mapping, in any known naming; see `resolve`.
        dst: its suffix decides the format; what stands there is replaced, atomically.
        model: "layer" or the name of a VOLO variant; None means what the tensors show.
        to: the naming to write, "torch", "flax" or "external-attention"; None means the other twin's, but always
            PyTorch's for PyTorch's own files and Flax's for Orbax's.
        prefix: where in the source the model lies; it is not written.
        dtype: to cast floating-point tensors to; None keeps every bit.
        use_ema: take the averaged weights.
        allow_missing: write what there is, though the model has more.
        ignore_unexpected: leave out what the model has not.
        max_shard_size: in bytes; makes `dst` a folder of `.safetensors` of up to this size and their index.
        manifest: whether to hash every tensor.
        progress: called with (bytes done, bytes in all), now and then; bytes that are compared only after all have
            been written count twice.

    Returns:
        What was found and written.

    Raises:
        WeightsError: the source is of no known model, or anything is wrong with its tensors (everything is reported
            together), a number is too large for `dtype`, `dst` lies inside a folder that is read, or what was written
            does not read back equal; `dst` is then as it was.
        ValueError: the naming `to`, the model or the dtype is unknown, or the naming is Flax's for a file of PyTorch's.
        OSError: a file cannot be opened or written.
        ImportError: a file needs a framework that is not installed.
    """
    file_format = format_of(dst) if max_shard_size is None else folder_of_shards(max_shard_size)
    if dtype is not None and dtype not in _FLOATS:
        raise ValueError(f"dtype must be one of {', '.join(_FLOATS)}, got {dtype!r}")
    checkpoint = open_checkpoint(src, prefix=prefix, use_ema=use_ema)
    if checkpoint.file is not None and checkpoint.file.resolve() in Path(dst).resolve().parents:
        raise WeightsError(f"{dst}: it would lie inside the checkpoint that is read, {checkpoint.file}")
    found = recognise_checkpoint(checkpoint, model)
    if found is None:
        raise WeightsError(_unrecognised(checkpoint, model))
    planned = plan(checkpoint, found.table, allow_missing=allow_missing, ignore_unexpected=ignore_unexpected)
    to = to or _default_naming(file_format, planned.naming)
    if file_format.torch_names and to == FLAX:
        raise ValueError(f"{dst}: a file of PyTorch's holds PyTorch's names; for Flax's use .safetensors or .npz")
    tensors = planned.tensors if dtype is None else {n: _as(dtype, n, t) for n, t in planned.tensors.items()}
    written = _renamed(tensors, found.table, to)
    lines = manifest_of(tensors) if manifest else None  # now: what is written may replace what it is read from
    total = (1 if file_format.checks_itself else 2) * sum(tensor.nbytes for tensor in written.values())
    with ThreadPoolExecutor(1) as hashing:
        source_hash = None if checkpoint.file is None else hashing.submit(source_sha256, checkpoint.file)
        metadata = _metadata(checkpoint, found, to, source_hash)
        write_tensors(Path(dst), file_format, written, metadata, _adding_up(progress, total))
    return Conversion(
        source=checkpoint.label,
        source_sha256=None if source_hash is None else source_hash.result(),
        destination=str(dst),
        prefix=checkpoint.prefix,
        model=found.table.model,
        sizes=found.sizes,
        found_naming=planned.naming,
        written_naming=to,
        tensors=len(written),
        dtypes=dict(Counter(tensor.dtype.name for tensor in written.values())),
        missing=planned.missing,
        not_weights=checkpoint.not_weights,
        ignored=planned.unexpected,
        manifest=lines,
    )


def _default_naming(file_format: Format, found: str) -> str:
    if file_format.usual_naming is not None:
        return file_format.usual_naming
    return TORCH if found == FLAX else FLAX


def _metadata(
    checkpoint: Checkpoint, found: Recognised, naming: str, source_hash: "Future[str] | None"
) -> dict[str, "str | Future[str]"]:
    theirs = {
        name: value for name, value in checkpoint.metadata.items() if name != _FORMAT and not name.startswith(_OURS)
    }
    ours: dict[str, str | Future[str]] = {
        "version": version("outlook-attention"),
        "model": found.table.model,
        "config": json.dumps(found.config),
    }
    if source_hash is not None:
        ours["source_sha256"] = source_hash
    return theirs | {_OURS + name: value for name, value in ours.items()} | file_metadata(naming)


def file_metadata(naming: str) -> dict[str, str]:
    """Return what tells other programs whose names a file holds."""
    return {_FORMAT: _FORMAT_OF_NAMING.get(naming, "pt")}


def _as(dtype: str, name: str, tensor: LazyTensor) -> LazyTensor:
    if not is_floating(tensor) or tensor.dtype == DTYPES[dtype]:
        return tensor
    return Computed(tensor, DTYPES[dtype], tensor.shape, partial(_cast, name=name, dtype=dtype))


def _cast(array: np.ndarray, *, name: str, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        found = cast(array, dtype)
    with np.errstate(invalid="ignore"):  # looking at a signalling NaN of bfloat16 sets it off
        lost = np.isinf(found) & np.isfinite(array)
        if lost.any():
            largest = np.abs(array[lost].astype(np.float64)).max()
            raise WeightsError(
                f"{printable(name)}: {np.count_nonzero(lost)} numbers are too large for {dtype}, up to {largest:.6g}"
            )
    return found


def _adding_up(progress: Progress | None, total: int) -> Callable[[int], None] | None:
    if progress is None:
        return None
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    return add


def _renamed(tensors: Mapping[str, LazyTensor], table: WeightTable, naming: str) -> dict[str, LazyTensor]:
    return {
        name: Computed(tensors[entry.torch], tensors[entry.torch].dtype, entry.flax_shape, entry.to_flax)
        if naming == FLAX and entry.layout != "same"
        else tensors[entry.torch]
        for name, entry in table.names(naming).items()
        if entry.torch in tensors
    }


def renamed(arrays: Mapping[str, np.ndarray], table: WeightTable, naming: str) -> dict[str, np.ndarray]:
    """Return {name in `naming`: array in that naming's layout} from a model's arrays under PyTorch's names.

    Raises:
        ValueError: the model has no such naming.
    """
    return {
        name: entry.to_flax(arrays[entry.torch]) if naming == FLAX else arrays[entry.torch]
        for name, entry in table.names(naming).items()
    }


def recognise_checkpoint(checkpoint: Checkpoint, model: str | None = None) -> Recognised | None:
    """Return the known model that the tensors of a checkpoint are of, or None; or the one called `model`.

    Raises:
        ValueError: there is no such model; the message says the nearest name.
    """
    shapes = _shapes(dict(checkpoint.items))
    return recognise(shapes) if model is None else recognise_as(model, shapes)


def recognisable_prefixes(checkpoint: Checkpoint) -> list[str]:
    """Return the prefixes under which a checkpoint has a known model."""
    return checkpoint.prefixes_where(lambda part: recognise(_shapes(part)) is not None)


def _shapes(values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(getattr(value, "shape", ())) for name, value in values.items()}


def nothing_below(checkpoint: Checkpoint) -> str:
    """Say that a checkpoint has nothing below its prefix, and what it has."""
    if prefixes := recognisable_prefixes(checkpoint):
        there = f"there is a known model with prefix={', '.join(map(repr, prefixes))}"
    elif (whole := recognise_checkpoint(checkpoint.below(""))) is not None:
        there = f"without a prefix there is {whole.table.model}"
    else:
        there = f"its names are {listed(dict(checkpoint.everything))}"
    return f"{checkpoint.label}: nothing below the prefix {checkpoint.prefix!r}; {there}"


def _unrecognised(checkpoint: Checkpoint, model: str | None) -> str:
    if checkpoint.prefix and not checkpoint.items:
        return nothing_below(checkpoint)
    where = checkpoint.label + (f", prefix {checkpoint.prefix!r}" if checkpoint.prefix else "")
    if prefixes := recognisable_prefixes(checkpoint):
        return f"{where}: no known model; but there is one with prefix={', '.join(map(repr, prefixes))}"
    known = ", ".join(known.config.__name__.removesuffix("Config") for known in MODELS)
    names = sorted(checkpoint.names)
    wanted = "known model" if model is None else model
    hint = ""
    if model is None and recognise_checkpoint(checkpoint, LAYER) is not None:
        hint = f"; it has parts of a layer: with model={LAYER!r} (--model {LAYER}) it is said what that lacks"
    return f"{where}: no {wanted} in its {len(names)} tensors ({listed(names)}); known: {known}{hint}"
