"""From one naming, layout and file format to another; dtypes and bits stay as they are."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from outlook_common.weights.checkpoint import Checkpoint, Source, open_checkpoint
from outlook_common.weights.errors import WeightsError
from outlook_common.weights.files import PathLike, format_of, write_arrays
from outlook_common.weights.models import MODELS, Recognised, recognise
from outlook_common.weights.resolve import naming_of, resolve_checkpoint
from outlook_common.weights.table import FLAX, TORCH, WeightTable

# What other programs look for in the header of a .safetensors file.
_HEADERS = {FLAX: {"format": "flax"}}
_TORCH_HEADER = {"format": "pt"}


@dataclass(frozen=True)
class Conversion:
    """What was found in a file and what was written.

    Attributes:
        source: what was read.
        destination: what was written.
        prefix: the part of the source that was read.
        model: what the tensors are of.
        sizes: of the model, as far as its tensors tell.
        found_naming: of the source.
        written_naming: of the destination.
        tensors: how many were written.
        dtypes: dtype -> how many tensors have it.
    """

    source: str
    destination: str
    prefix: str
    model: str
    sizes: dict[str, int | bool]
    found_naming: str
    written_naming: str
    tensors: int
    dtypes: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict that JSON can hold."""
        return asdict(self)


def convert(
    src: Source, dst: PathLike, *, to: str | None = None, prefix: str = "", use_ema: bool = False
) -> Conversion:
    """Convert the weights of a known model from one file to another; needs no framework, but for PyTorch's own files.

    Args:
        src: a path or a mapping, in any known naming; see `resolve`.
        dst: its suffix decides the format; what stands there is replaced, atomically.
        to: the naming to write, "torch", "flax" or "external-attention"; None means the other twin's, but always
            PyTorch's for PyTorch's own files.
        prefix: where in the source the model lies; it is not written.
        use_ema: take the averaged weights.

    Returns:
        What was found and written.

    Raises:
        WeightsError: the source is of no known model, or anything is wrong with its tensors (everything is reported
            together), or what was written does not read back equal; `dst` is then as it was.
        ValueError: the naming `to` is unknown to the model, or is Flax's for a file of PyTorch's.
        OSError: a file cannot be opened or written.
        ImportError: a file is PyTorch's own, and PyTorch is not installed.
    """
    torch_file = format_of(dst).torch_only
    checkpoint = open_checkpoint(src, prefix=prefix, use_ema=use_ema)
    found = recognise_checkpoint(checkpoint)
    if found is None:
        raise WeightsError(_unrecognised(checkpoint))
    found_naming = naming_of(checkpoint.names, found.table)
    if to is None:
        to = TORCH if torch_file or found_naming == FLAX else FLAX
    if torch_file and to == FLAX:
        raise ValueError(f"{dst}: a file of PyTorch's holds PyTorch's names; for Flax's use .safetensors or .npz")
    arrays = renamed(resolve_checkpoint(checkpoint, found.table), found.table, to)
    write_arrays(dst, arrays, _HEADERS.get(to, _TORCH_HEADER))
    return Conversion(
        source=checkpoint.label,
        destination=str(dst),
        prefix=checkpoint.prefix,
        model=found.table.model,
        sizes=found.sizes,
        found_naming=found_naming,
        written_naming=to,
        tensors=len(arrays),
        dtypes=dict(Counter(array.dtype.name for array in arrays.values())),
    )


def renamed(arrays: dict[str, np.ndarray], table: WeightTable, naming: str) -> dict[str, np.ndarray]:
    """Return {name in `naming`: array in that naming's layout} from a model's arrays under PyTorch's names.

    Raises:
        ValueError: the model has no such naming.
    """
    return {
        name: entry.to_flax(arrays[entry.torch]) if naming == FLAX else arrays[entry.torch]
        for name, entry in table.names(naming).items()
    }


def recognise_checkpoint(checkpoint: Checkpoint) -> Recognised | None:
    """Return the known model that the tensors of a checkpoint are of, or None."""
    return recognise(_shapes(dict(checkpoint.items)))


def recognisable_prefixes(checkpoint: Checkpoint) -> list[str]:
    """Return the prefixes under which a checkpoint has a known model."""
    return checkpoint.prefixes_where(lambda part: recognise(_shapes(part)) is not None)


def _shapes(values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(getattr(value, "shape", ())) for name, value in values.items()}


def _unrecognised(checkpoint: Checkpoint) -> str:
    where = checkpoint.label + (f", prefix {checkpoint.prefix!r}" if checkpoint.prefix else "")
    if prefixes := recognisable_prefixes(checkpoint):
        return f"{where}: no known model; but there is one with prefix={', '.join(map(repr, prefixes))}"
    known = ", ".join(model.config.__name__.removesuffix("Config") for model in MODELS)
    names = sorted(checkpoint.names)
    return f"{where}: no known model in its {len(names)} tensors ({', '.join(names[:8])}…); known: {known}"
