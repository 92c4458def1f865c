"""Inspect a checkpoint, or compare two, in any formats and namings."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from outlook_common.arrays import is_floating, is_number
from outlook_common.text import printable
from outlook_common.weights.checkpoint import Checkpoint, Source, open_checkpoint
from outlook_common.weights.checksums import Checksum, checksum_of, combined_sha256, source_sha256
from outlook_common.weights.errors import Problem, WeightsError
from outlook_common.weights.identify import Recognised, nothing_below, recognisable_prefixes, recognise_checkpoint
from outlook_common.weights.io.lazy import Computed, LazyTensor, as_lazy, same_bytes
from outlook_common.weights.match import naming_of
from outlook_common.weights.statistics import Statistics
from outlook_common.weights.tables.base import FLAX


@dataclass(frozen=True)
class Row:
    """One named value of a checkpoint.

    Attributes:
        name: in the file.
        dtype: of a tensor; else what the value is instead.
        shape: in the file's layout; () for a value that is no tensor.
        statistics: of the numbers; None for a value that is no tensor.
        checksum: under PyTorch's name and in its layout where the model is known; None likewise.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    statistics: Statistics | None
    checksum: Checksum | None


@dataclass(frozen=True)
class Inspection:
    """Contents of a checkpoint.

    Attributes:
        label: what was read.
        prefix: the part that was inspected.
        sha256: of the file; None for a mapping.
        weights_sha256: of the tensors, alike in every naming and format.
        model: the known model; None if there is none.
        naming: of the checkpoint; None likewise.
        prefixes: below which there are known models.
        metadata: of the file.
        rows: a row per value.
        not_weights: names left out as random streams and rates of stochastic depth.
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
    def manifest(self) -> tuple[Checksum, ...]:
        """The checksums of all tensors, in the file's order."""
        return tuple(row.checksum for row in self.rows if row.checksum is not None)


def inspect(source: Source, *, prefix: str = "", use_ema: bool = False) -> Inspection:
    """Return the model, naming, tensors, statistics and checksums of a checkpoint; every number is read once.

    Args:
        source: a path, a Hub id or a mapping, of a known model or not.
        prefix: inspect only what is below it.
        use_ema: take the averaged weights.

    Raises:
        WeightsError: the file cannot be read or is damaged, or nothing is below the prefix.
        OSError: the file cannot be opened.
        ImportError: the format needs a framework that is not installed.
    """
    checkpoint = open_checkpoint(source, prefix=prefix, use_ema=use_ema)
    if checkpoint.prefix and not checkpoint.items and not checkpoint.not_weights:
        raise WeightsError(nothing_below(checkpoint))
    model = recognise_checkpoint(checkpoint)
    naming = None if model is None else naming_of(checkpoint.names, model.table)
    rows = tuple(_row(name, value, *_canonical(name, value, model, naming)) for name, value in checkpoint.items)
    return Inspection(
        label=checkpoint.label,
        prefix=checkpoint.prefix,
        sha256=None if checkpoint.file is None else source_sha256(checkpoint.file),
        weights_sha256=combined_sha256(row.checksum for row in rows if row.checksum is not None),
        model=model,
        naming=naming,
        prefixes=tuple(recognisable_prefixes(checkpoint)),
        metadata=dict(checkpoint.metadata),
        rows=rows,
        not_weights=checkpoint.not_weights,
    )


def _canonical(name: str, value: Any, model: Recognised | None, naming: str | None) -> tuple[str, LazyTensor | None]:
    """Return a tensor under PyTorch's name and in its layout where the model is known; None for no tensor."""
    try:
        tensor = as_lazy(value)
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
        kind = getattr(value, "dtype", type(value).__name__)
        return Row(name, f"not numbers: {kind}", (), None, None)
    statistics = Statistics(tensor.dtype)
    checksum = checksum_of(torch_name, tensor, statistics.watch(tensor.blocks()))
    return Row(name, tensor.dtype.name, tuple(value.shape) if hasattr(value, "shape") else (), statistics, checksum)


@dataclass(frozen=True)
class Difference:
    """One difference between two checkpoints A and B.

    Attributes:
        name: of the tensor; PyTorch's where the model is known.
        kind: "only in A", "only in B", "shape", "dtype" or "numbers".
        detail: a sentence with the numbers.
        differing: count of numbers that differ in any bit (between dtypes: in value); 0 where not comparable.
        largest: max |A - B| over finite numbers.
    """

    name: str
    kind: str
    detail: str
    differing: int = 0
    largest: float = 0.0


def differences(a: Checkpoint, b: Checkpoint) -> list[Difference]:
    """Compare two checkpoints under PyTorch's names and layout; empty if every bit agrees.

    Raises:
        WeightsError: a file is damaged, has no tensors, or has two of one name.
    """
    in_a, in_b = _tensors(a), _tensors(b)
    found = [Difference(name, "only in A", _described(in_a[name])) for name in in_a if name not in in_b]
    found += [Difference(name, "only in B", _described(in_b[name])) for name in in_b if name not in in_a]
    for name in in_a:
        if name in in_b:
            found += _compare_tensors(name, in_a[name], in_b[name])
    return found


def _tensors(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    model = recognise_checkpoint(checkpoint)
    naming = None if model is None else naming_of(checkpoint.names, model.table)
    tensors: dict[str, LazyTensor] = {}
    duplicates = []
    for found, value in checkpoint.items:
        name, tensor = _canonical(found, value, model, naming)
        if tensor is None:
            continue
        if name in tensors:
            duplicates.append(
                Problem("duplicate", found, f"{printable(found)} is {printable(name)}, and so is another")
            )
        tensors[name] = tensor
    if duplicates:
        raise WeightsError(f"{checkpoint.label}: duplicate names, not compared", duplicates)
    if not tensors:
        raise WeightsError(f"{checkpoint.label}: no tensors to compare")
    return tensors


def _described(tensor: LazyTensor) -> str:
    return f"{tensor.dtype} {tensor.shape}"


def _compare_tensors(name: str, a: LazyTensor, b: LazyTensor) -> Iterator[Difference]:
    if a.shape != b.shape:
        yield Difference(name, "shape", f"{a.shape} in A, {b.shape} in B")
        return
    if a.dtype != b.dtype:
        differing, largest = _compare_values(a.read(), b.read())
        words = f"{differing} numbers differ, by {largest:.3g} at most" if differing else "all numbers are equal"
        yield Difference(name, "dtype", f"{a.dtype} in A, {b.dtype} in B; {words}", differing, largest)
        return
    differing, largest = 0, 0.0
    for x, y in zip(a.blocks(), b.blocks(), strict=True):
        if not same_bytes(x, y):
            word = np.dtype(f"u{a.dtype.itemsize}")
            differing += int(np.count_nonzero(x.view(word) != y.view(word)))
            largest = max(largest, _compare_values(x.view(a.dtype), y.view(a.dtype))[1])
    if differing:
        total = a.nbytes // a.dtype.itemsize
        detail = f"{differing} of {total} numbers differ, by {largest:.3g} at most"
        yield Difference(name, "numbers", detail, differing, largest)


def _compare_values(x: np.ndarray, y: np.ndarray) -> tuple[int, float]:
    """Return how many numbers differ in value, NaN equal to NaN, and the largest finite difference."""
    with np.errstate(invalid="ignore"):
        x, y = (array.astype(np.float64 if is_floating(array) else array.dtype) for array in (x, y))
        differ = ~((x == y) | ((x != x) & (y != y)))
        gaps = np.abs(x.astype(np.float64) - y.astype(np.float64))
    finite = gaps[np.isfinite(gaps)]
    return int(np.count_nonzero(differ)), float(finite.max(initial=0.0))
