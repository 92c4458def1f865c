"""Match a checkpoint's names, shapes and dtypes to a model's weight table."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from outlook_common.arrays import is_floating, is_number
from outlook_common.text import closest
from outlook_common.weights.checkpoint import Checkpoint, Source, open_checkpoint
from outlook_common.weights.errors import Problem, WeightsError
from outlook_common.weights.identify import recognise
from outlook_common.weights.io.lazy import Computed, LazyTensor, as_lazy
from outlook_common.weights.tables.base import FLAX, Entry, WeightTable

# Finding similar names takes time quadratic in their number: for how many names they are looked for, among how many.
_MOST_SUGGESTIONS = 20
_MOST_CANDIDATES = 1000


def resolve(source: Source, table: WeightTable, *, prefix: str = "", use_ema: bool = False) -> dict[str, np.ndarray]:
    """Return every tensor of a model under PyTorch's names, in PyTorch's layout, from a source in any known naming.

    Dtypes are those of the source, except for entries with a dtype of their own. The arrays may share memory with the
    source.

    Args:
        source: a path, a Hub id or a mapping; see `open_checkpoint`.
        table: of the model.
        prefix: where in the source the model is; everything else is ignored.
        use_ema: take the averaged weights.

    Raises:
        WeightsError: tensors are missing, unexpected, misshapen, duplicate, non-numeric or in mixed namings; all
            problems are reported together.
        OSError: the file cannot be opened.
        ImportError: the format needs a framework that is not installed.
    """
    return resolve_checkpoint(open_checkpoint(source, prefix=prefix, use_ema=use_ema), table)


def resolve_checkpoint(checkpoint: Checkpoint, table: WeightTable) -> dict[str, np.ndarray]:
    """Do what `resolve` does, for an open checkpoint."""
    return {name: tensor.read() for name, tensor in match(checkpoint, table).tensors.items()}


def naming_of(names: Iterable[str], table: WeightTable) -> str:
    """Return the naming that knows most of `names`; on a tie the first of `table.namings`."""
    found = set(names)
    return max(table.namings, key=lambda naming: len(found & table.names(naming).keys()))


def is_complete(names: Iterable[str], table: WeightTable) -> bool:
    """Whether `names` include every entry of the table, in one naming."""
    found = set(names)
    return any(table.names(naming).keys() <= found for naming in table.namings)


@dataclass(frozen=True)
class Match:
    """A checkpoint's tensors matched to a model's; checked by name, shape and dtype, with no numbers read.

    Attributes:
        tensors: under PyTorch's names, in its layout and the order of the table.
        naming: of the checkpoint.
        missing: names, in that naming, that only the model has.
        unexpected: names that only the checkpoint has.
    """

    tensors: dict[str, LazyTensor]
    naming: str
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()


def match(
    checkpoint: Checkpoint, table: WeightTable, *, allow_missing: bool = False, ignore_unexpected: bool = False
) -> Match:
    """Match a checkpoint in any known naming to a model.

    Args:
        checkpoint: to read from.
        table: of the model.
        allow_missing: accept a checkpoint that lacks some tensors, not all.
        ignore_unexpected: accept a checkpoint with further tensors.

    Raises:
        WeightsError: as `resolve` says.
    """
    naming = naming_of(checkpoint.names, table)
    tensors, found_as, problems = _match_tensors(checkpoint, table, naming)
    names = table.names(naming)
    missing = [name for name, entry in names.items() if entry.torch not in found_as]
    unexpected = sorted(name for name in checkpoint.names if _entry_in_any_naming(name, table) is None)
    if not (allow_missing and tensors):
        problems += _missing(missing, unexpected, names, naming)
    if not ignore_unexpected:
        problems += _unexpected(unexpected, names)
    if problems:
        raise WeightsError(_summary(checkpoint, table, problems), sorted(problems, key=lambda problem: problem.kind))
    in_order = {entry.torch: tensors[entry.torch] for entry in table.entries if entry.torch in tensors}
    return Match(in_order, naming, tuple(missing), tuple(unexpected))


def _match_tensors(
    checkpoint: Checkpoint, table: WeightTable, naming: str
) -> tuple[dict[str, LazyTensor], dict[str, str], list[Problem]]:
    """Return {PyTorch name: tensor}, {PyTorch name: name in the checkpoint}, and what is wrong with tensors there."""
    tensors: dict[str, LazyTensor] = {}
    found_as: dict[str, str] = {}
    problems: list[Problem] = []
    for name, value in checkpoint.items:
        own = table.names(naming).get(name)
        entry = own or _entry_in_any_naming(name, table)
        if entry is None:
            continue  # unexpected
        if entry.torch in found_as:
            detail = f"{name} is {entry.torch}, and so is {found_as[entry.torch]}"
            problems.append(Problem("duplicate", name, detail))
            continue
        found_as[entry.torch] = name
        if own is None:
            expected = next(known for known, other in table.names(naming).items() if other is entry)
            detail = f"{name}: the other names are {naming}'s, in which it is {expected}"
            problems.append(Problem("mixed naming", name, detail))
            continue
        tensor, wrong = _checked(name, value, entry, naming)
        problems += wrong
        if tensor is not None:
            tensors[entry.torch] = tensor
    return tensors, found_as, problems


def _entry_in_any_naming(name: str, table: WeightTable) -> Entry | None:
    return next((table.names(naming)[name] for naming in table.namings if name in table.names(naming)), None)


def _checked(name: str, value: Any, entry: Entry, naming: str) -> tuple[LazyTensor | None, list[Problem]]:
    """Return a tensor in PyTorch's layout, or None and what is wrong with it."""
    try:
        tensor = as_lazy(value)
    except TypeError as error:
        return None, [Problem("non-numeric", name, f"{name}: {error}")]
    if not is_number(tensor.dtype):
        return None, [Problem("non-numeric", name, f"{name}: an array of {tensor.dtype}")]
    problems = []
    fits = is_floating(tensor) if entry.dtype is None else tensor.dtype.kind in "iu"
    if not fits:
        wanted = "floating-point numbers" if entry.dtype is None else "integers"
        problems.append(Problem("non-numeric", name, f"{name}: {tensor.dtype}, expected {wanted}"))
    expected = entry.shape_in(naming)
    if tensor.shape != expected:
        problems.append(Problem("misshapen", name, f"{name}: {tensor.shape}, expected {expected}"))
    return (None if problems else _in_torch_layout(tensor, entry, naming)), problems


def _in_torch_layout(tensor: LazyTensor, entry: Entry, naming: str) -> LazyTensor:
    dtype = tensor.dtype if entry.dtype is None else np.dtype(entry.dtype)
    if dtype == tensor.dtype and (naming != FLAX or entry.layout == "same"):
        return tensor

    def compute(array: np.ndarray) -> np.ndarray:
        return (entry.to_torch(array) if naming == FLAX else array).astype(dtype, copy=False)

    return Computed(tensor, dtype, entry.shape, compute)


# Reports.


def _missing(
    missing: Sequence[str], unexpected: Sequence[str], names: dict[str, Entry], naming: str
) -> Iterable[Problem]:
    for index, name in enumerate(missing):
        similar = _suggestion(index, name, unexpected, "the most similar found is")
        yield Problem("missing", name, f"{name} {names[name].shape_in(naming)}{similar}")


def _unexpected(unexpected: Sequence[str], names: dict[str, Entry]) -> Iterable[Problem]:
    for index, name in enumerate(unexpected):
        yield Problem("unexpected", name, f"{name}{_suggestion(index, name, list(names), 'the most similar known is')}")


def _suggestion(index: int, name: str, candidates: Sequence[str], words: str) -> str:
    similar = closest(name, candidates[:_MOST_CANDIDATES]) if index < _MOST_SUGGESTIONS else None
    return f"; {words} {similar}" if similar else ""


def _summary(checkpoint: Checkpoint, table: WeightTable, problems: Sequence[Problem]) -> str:
    """Return the first line of the error: how many problems, and where or of what the tensors are instead."""
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    message = f"{checkpoint.where}: {count} with its {len(checkpoint.items)} tensors for {table.model}"
    if not checkpoint.items:
        message = f"{checkpoint.where}: nothing there for {table.model}"
    if elsewhere := checkpoint.prefixes_where(lambda shapes: is_complete(shapes, table)):
        message += f"; a complete one is found with prefix={', '.join(map(repr, elsewhere))}"
    if other := _other_model(checkpoint, table):
        message += f"; they are those of {other}"
    return message


def _other_model(checkpoint: Checkpoint, table: WeightTable) -> str | None:
    """Return which other known model the tensors fit, every one by name and shape."""
    found = recognise(checkpoint.shapes)
    if found is None or found.table.model == table.model:
        return None
    naming = naming_of(checkpoint.names, found.table)
    expected = {name: entry.shape_in(naming) for name, entry in found.table.names(naming).items()}
    return found.table.model if checkpoint.shapes == expected else None
