"""Convert a checkpoint to another naming, layout and file format, bit for bit unless cast."""

from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from outlook_common.config import VOLOConfig
from outlook_common.weights.cast import FLOATS, cast_floats
from outlook_common.weights.checkpoint import Checkpoint, Source, open_checkpoint
from outlook_common.weights.checksums import Checksum, checksums_of, source_sha256
from outlook_common.weights.config_file import read_config
from outlook_common.weights.errors import WeightsError
from outlook_common.weights.formats.base import Format, PathLike
from outlook_common.weights.formats.registry import format_of, write_tensors
from outlook_common.weights.formats.sharded import folder_of_shards
from outlook_common.weights.identify import Recognised, identify, volo_of
from outlook_common.weights.io.lazy import LazyTensor
from outlook_common.weights.match import Match, match
from outlook_common.weights.metadata import FORMAT, OURS, own_metadata
from outlook_common.weights.rename import rename
from outlook_common.weights.tables.base import FLAX, TORCH

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Conversion:
    """Result of a conversion.

    Attributes:
        source: what was read.
        source_sha256: SHA-256 of the file, or of the list of several files; None for a mapping.
        destination: what was written.
        prefix: the part of the source that was converted.
        model: the model's name.
        sizes: of the model, as its tensors show.
        found_naming: of the source.
        written_naming: of the destination.
        tensors: number of tensors written.
        dtypes: dtype -> number of tensors written.
        missing: the model's tensors that the source lacks (`allow_missing`).
        not_weights: names left out as random streams and rates of stochastic depth.
        ignored: tensors of the source that the model lacks (`ignore_unexpected`).
        manifest: a checksum per tensor written; None unless requested.
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
    manifest: tuple[Checksum, ...] | None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict for JSON."""
        return asdict(self)


def convert(
    src: Source,
    dst: PathLike,
    *,
    model: str | None = None,
    config: PathLike | Mapping[str, Any] | VOLOConfig | None = None,
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

    Needs no framework, except PyTorch for PyTorch's files and to write DCP folders, and JAX for Orbax's. Memory stays
    below the largest tensor plus 200 MB, except for PyTorch's files and DCP folders that are written.

    Args:
        src: a path, a Hub id or a mapping, in any known naming; see `resolve`.
        dst: the path to write; its suffix selects the format. An existing file is replaced, atomically.
        model: "layer" or the name of a VOLO variant; None to recognise it by its tensors.
        config: of a VOLO of own sizes, instead of `model`: a `.toml` or `.json` file or a mapping of fields of
            `VOLOConfig`, with `variant` changes to a released one; image size, class count and channels are those of
            the source unless given.
        to: the naming to write, "torch", "flax" or "external-attention"; None for the other twin's, but always
            PyTorch's in PyTorch's files and DCP folders, and Flax's in Orbax's and `.msgpack`.
        prefix: where in the source the model is; not written.
        dtype: cast floating-point tensors to it; None keeps every bit.
        use_ema: take the averaged weights.
        allow_missing: accept a source that lacks tensors of the model.
        ignore_unexpected: leave out tensors that the model lacks.
        max_shard_size: in bytes; makes `dst` a folder of `.safetensors` of up to this size and their index.
        manifest: compute a checksum per tensor.
        progress: called with (bytes done, total bytes); bytes that are compared only after writing count twice.

    Raises:
        WeightsError: the source is of no known model, its tensors do not match (all problems are reported together), a
            number overflows `dtype`, `dst` is inside a folder that is read, or what was written does not read back
            equal; `dst` is then unchanged.
        ValueError: `to`, `model` or `dtype` is unknown, `config` is no configuration or is given beside `model`, or
            Flax's names are requested in a file of PyTorch's.
        OSError: a file cannot be opened or written.
        ImportError: a format needs a framework that is not installed.
    """
    file_format = format_of(dst) if max_shard_size is None else folder_of_shards(max_shard_size)
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"dtype must be one of {', '.join(FLOATS)}, got {dtype!r}")
    if model is not None and config is not None:
        raise ValueError(f"model={model!r} and config= both say which model it is; pass one")
    checkpoint = open_checkpoint(src, prefix=prefix, use_ema=use_ema)
    _check_not_inside(dst, checkpoint)
    found = identify(checkpoint, model) if config is None else volo_of(read_config(config, checkpoint.shapes))
    matched = match(checkpoint, found.table, allow_missing=allow_missing, ignore_unexpected=ignore_unexpected)
    naming = _naming_to_write(to, matched.naming, file_format, dst)
    tensors = matched.tensors if dtype is None else cast_floats(matched.tensors, dtype)
    renamed = rename(tensors, found.table, naming)
    checksums = checksums_of(tensors) if manifest else None  # before writing, which may replace the source
    source_hash = _write(dst, file_format, renamed, checkpoint, found, naming, progress)
    return _result(dst, checkpoint, found, matched, naming, renamed, source_hash, checksums)


def _check_not_inside(dst: PathLike, checkpoint: Checkpoint) -> None:
    if checkpoint.file is not None and checkpoint.file.resolve() in Path(dst).resolve().parents:
        raise WeightsError(f"{dst}: inside the checkpoint that is read, {checkpoint.file}")


def _naming_to_write(to: str | None, found: str, file_format: Format, dst: PathLike) -> str:
    naming = to or file_format.usual_naming or (TORCH if found == FLAX else FLAX)
    if file_format.torch_names and naming == FLAX:
        raise ValueError(f"{dst}: a file of PyTorch's holds PyTorch's names; for Flax's use .safetensors or .npz")
    return naming


def _write(
    dst: PathLike,
    file_format: Format,
    tensors: Mapping[str, LazyTensor],
    checkpoint: Checkpoint,
    found: Recognised,
    naming: str,
    progress: Progress | None,
) -> str | None:
    """Write the tensors; return the SHA-256 of the source, which is computed meanwhile."""
    total = (1 if file_format.verifies_itself else 2) * sum(tensor.nbytes for tensor in tensors.values())
    with ThreadPoolExecutor(1) as hashing:
        source_hash = None if checkpoint.file is None else hashing.submit(source_sha256, checkpoint.file)
        metadata = _metadata(checkpoint, found, naming, source_hash)
        write_tensors(Path(dst), file_format, tensors, metadata, _cumulative(progress, total))
    return None if source_hash is None else source_hash.result()


def _metadata(
    checkpoint: Checkpoint, found: Recognised, naming: str, source_hash: "Future[str] | None"
) -> dict[str, "str | Future[str]"]:
    kept = {name: text for name, text in checkpoint.metadata.items() if name != FORMAT and not name.startswith(OURS)}
    cfg = checkpoint.pretrained_cfg if not checkpoint.prefix else {}
    own: dict[str, str | Future[str]] = {**own_metadata(found.table.model, found.config, naming, cfg)}
    if source_hash is not None:
        own[f"{OURS}source_sha256"] = source_hash
    return kept | own


def _cumulative(progress: Progress | None, total: int) -> Callable[[int], None] | None:
    if progress is None:
        return None
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    return add


def _result(
    dst: PathLike,
    checkpoint: Checkpoint,
    found: Recognised,
    matched: Match,
    naming: str,
    written: Mapping[str, LazyTensor],
    source_hash: str | None,
    checksums: tuple[Checksum, ...] | None,
) -> Conversion:
    return Conversion(
        source=checkpoint.label,
        source_sha256=source_hash,
        destination=str(dst),
        prefix=checkpoint.prefix,
        model=found.table.model,
        sizes=found.sizes,
        found_naming=matched.naming,
        written_naming=naming,
        tensors=len(written),
        dtypes=dict(Counter(tensor.dtype.name for tensor in written.values())),
        missing=matched.missing,
        not_weights=checkpoint.not_weights,
        ignored=matched.unexpected,
        manifest=checksums,
    )
