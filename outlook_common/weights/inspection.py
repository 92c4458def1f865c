"""What a checkpoint holds, and in what two of them differ, whatever their formats and namings."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from outlook_common.arrays import is_floating, is_number
from outlook_common.text import printable
from outlook_common.weights.checkpoint import Checkpoint
from outlook_common.weights.checksums import Line, line_of, sha256_of, source_sha256
from outlook_common.weights.conversion import nothing_below, recognisable_prefixes, recognise_checkpoint
from outlook_common.weights.errors import Problem, WeightsError
from outlook_common.weights.identify import Recognised
from outlook_common.weights.io.lazy import Computed, LazyTensor, same_bytes, stored
from outlook_common.weights.match import naming_of
from outlook_common.weights.statistics import Statistics
from outlook_common.weights.tables.base import FLAX


@dataclass(frozen=True)
class Row:
    """One tensor of a file, by its name there; `dtype` says what it is instead where it is none, and all else is empty.

    Attributes:
        name: in the file.
        dtype: of its numbers.
        shape: in the file's layout.
        statistics: of its numbers, None if they are no numbers.
        line: of the manifest, under PyTorch's name and in its layout where the model is known.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    statistics: Statistics | None
    line: Line | None


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint holds.

    Attributes:
        label: what was read.
        prefix: which part was looked at.
        sha256: of the file's bytes; None for a mapping.
        weights_sha256: of the tensors, alike in every naming and format.
        model: what the tensors are of; None if that is not known.
        naming: of the checkpoint, None likewise.
        prefixes: under which it has known models.
        metadata: what the file says of itself.
        rows: the tensors.
        not_weights: names of a model's random streams and rates of stochastic depth, which are left out.
    """

    label: str
    prefix: str
    sha256: str | None
    weights_sha256: str
    model: Recognised | None
    naming: str | None
    prefixes: tuple[str, ...]
    metadata: dict[str, str]
    rows: tuple[Row, ...]
    not_weights: tuple[str, ...]

    @property
    def manifest(self) -> tuple[Line, ...]:
        """The lines of all tensors, in the file's order."""
        return tuple(row.line for row in self.rows if row.line is not None)


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """Return what a checkpoint holds; every number is read once.

    Raises:
        WeightsError: a part of the file is damaged, or there is nothing below the prefix.
    """
    if checkpoint.prefix and not checkpoint.items and not checkpoint.not_weights:
        raise WeightsError(nothing_below(checkpoint))
    model = recognise_checkpoint(checkpoint)
    naming = None if model is None else naming_of(checkpoint.names, model.table)
    rows = tuple(_row(name, value, *_canonical(name, value, model, naming)) for name, value in checkpoint.items)
    return Inspection(
        checkpoint.label,
        checkpoint.prefix,
        None if checkpoint.file is None else source_sha256(checkpoint.file),
        sha256_of(row.line for row in rows if row.line is not None),
        model,
        naming,
        tuple(recognisable_prefixes(checkpoint)),
        dict(checkpoint.metadata),
        rows,
        checkpoint.not_weights,
    )


def _canonical(name: str, value: Any, model: Recognised | None, naming: str | None) -> tuple[str, LazyTensor | None]:
    """Return a tensor under PyTorch's name and in its layout, where the model has it; None if it is none."""
    try:
        tensor = stored(value)
    except TypeError:
        return name, None
    if not is_number(tensor.dtype):
        return name, None
    entry = None if model is None or naming is None else model.table.names(naming).get(name)
    if entry is None:
        return name, tensor
    if naming != FLAX or entry.layout == "same" or tensor.shape != entry.flax_shape:
        return entry.torch, tensor
    return entry.torch, Computed(tensor, tensor.dtype, entry.shape, entry.to_torch)


def _row(name: str, value: Any, torch_name: str, tensor: LazyTensor | None) -> Row:
    if tensor is None:
        what = getattr(value, "dtype", type(value).__name__)
        return Row(name, f"not numbers: {what}", (), None, None)
    statistics = Statistics(tensor.dtype)
    line = line_of(torch_name, tensor, statistics.watch(tensor.blocks()))
    return Row(name, tensor.dtype.name, tuple(value.shape) if hasattr(value, "shape") else (), statistics, line)


@dataclass(frozen=True)
class Difference:
    """In what one tensor differs between two checkpoints A and B.

    Attributes:
        name: PyTorch's, where the model is known.
        kind: "only in A", "only in B", "shape", "dtype" or "numbers".
        detail: in words, with the numbers.
        differing: how many numbers differ in any bit (for another dtype: in value); 0 where they cannot be compared.
        largest: of |A - B| over finite numbers.
    """

    name: str
    kind: str
    detail: str
    differing: int = 0
    largest: float = 0.0


def differences(a: Checkpoint, b: Checkpoint) -> list[Difference]:
    """Return in what two checkpoints differ, after their names and layouts are PyTorch's; empty if every bit agrees.

    Raises:
        WeightsError: a part of a file is damaged, or one of them has no tensors, or two of one name.
    """
    in_a, in_b = _tensors(a), _tensors(b)
    found = [Difference(name, "only in A", _described(in_a[name])) for name in in_a if name not in in_b]
    found += [Difference(name, "only in B", _described(in_b[name])) for name in in_b if name not in in_a]
    for name in in_a:
        if name in in_b:
            found += _between(name, in_a[name], in_b[name])
    return found


def _tensors(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    model = recognise_checkpoint(checkpoint)
    naming = None if model is None else naming_of(checkpoint.names, model.table)
    tensors: dict[str, LazyTensor] = {}
    twice = []
    for found, value in checkpoint.items:
        name, tensor = _canonical(found, value, model, naming)
        if tensor is None:
            continue
        if name in tensors:
            twice.append(Problem("duplicate", found, f"{printable(found)} is {printable(name)}, and so is another"))
        tensors[name] = tensor
    if twice:
        raise WeightsError(f"{checkpoint.label}: it cannot be compared, names come twice", twice)
    if not tensors:
        raise WeightsError(f"{checkpoint.label}: there are no tensors to compare")
    return tensors


def _described(tensor: LazyTensor) -> str:
    return f"{tensor.dtype} {tensor.shape}"


def _between(name: str, a: LazyTensor, b: LazyTensor) -> Iterator[Difference]:
    if a.shape != b.shape:
        yield Difference(name, "shape", f"{a.shape} in A, {b.shape} in B")
        return
    if a.dtype != b.dtype:
        differing, largest = _compare(a.read(), b.read())
        words = f"{differing} numbers differ, by {largest:.3g} at most" if differing else "every number is the same"
        yield Difference(name, "dtype", f"{a.dtype} in A, {b.dtype} in B; {words}", differing, largest)
        return
    differing, largest = 0, 0.0
    for x, y in zip(a.blocks(), b.blocks(), strict=True):
        if not same_bytes(x, y):
            word = np.dtype(f"u{a.dtype.itemsize}")
            differing += int(np.count_nonzero(x.view(word) != y.view(word)))
            largest = max(largest, _compare(x.view(a.dtype), y.view(a.dtype))[1])
    if differing:
        total = a.nbytes // a.dtype.itemsize
        detail = f"{differing} of {total} numbers differ, by {largest:.3g} at most"
        yield Difference(name, "numbers", detail, differing, largest)


def _compare(x: np.ndarray, y: np.ndarray) -> tuple[int, float]:
    """Return how many numbers differ in value, NaN equal to NaN, and the largest finite difference."""
    with np.errstate(invalid="ignore"):
        x, y = (array.astype(np.float64 if is_floating(array) else array.dtype) for array in (x, y))
        differ = ~((x == y) | ((x != x) & (y != y)))
        gaps = np.abs(x.astype(np.float64) - y.astype(np.float64))
    finite = gaps[np.isfinite(gaps)]
    return int(np.count_nonzero(differ)), float(finite.max(initial=0.0))
