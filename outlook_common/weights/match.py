"""From names and arrays as found to a model's own, or one error with everything that is wrong."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from outlook_common.arrays import is_floating, is_number
from outlook_common.text import closest
from outlook_common.weights.checkpoint import Checkpoint, Source, open_checkpoint
from outlook_common.weights.errors import Problem, WeightsError
from outlook_common.weights.identify import recognise
from outlook_common.weights.io.lazy import Computed, LazyTensor, stored
from outlook_common.weights.tables.base import FLAX, Entry, WeightTable

# Finding near names takes time that grows with the square of their number; messages show no more than this many.
_NEAREST_LIMIT = 20
# And among no more than this many it is looked for.
_NEAREST_AMONG = 1000


def resolve(source: Source, table: WeightTable, *, prefix: str = "", use_ema: bool = False) -> dict[str, np.ndarray]:
    """Return every tensor of a model under PyTorch's names, in PyTorch's layout, from a source in any known naming.

    Dtypes are those of the source, but for entries of the table that have their own. The arrays may share memory
    with the source.

    Args:
        source: a path or a mapping; see `open_checkpoint`.
        table: of the model.
        prefix: where in the source the model lies; what lies elsewhere is ignored.
        use_ema: take the averaged weights.

    Raises:
        WeightsError: anything is missing, unexpected, misshapen, there twice, named in a mixture of namings, or not
            made of numbers; all of it is reported together.
        OSError: the file cannot be opened.
        ImportError: reading the file needs PyTorch, which is not installed.
    """
    return resolve_checkpoint(open_checkpoint(source, prefix=prefix, use_ema=use_ema), table)


def naming_of(names: Iterable[str], table: WeightTable) -> str:
    """Return the naming in which most of `names` are known; the first of `table.namings` where several are equal."""
    found = set(names)
    return max(table.namings, key=lambda naming: len(found & table.names(naming).keys()))


def is_complete(names: Iterable[str], table: WeightTable) -> bool:
    """Whether `names` include every entry of the table, in one naming."""
    found = set(names)
    return any(table.names(naming).keys() <= found for naming in table.namings)


def resolve_checkpoint(checkpoint: Checkpoint, table: WeightTable) -> dict[str, np.ndarray]:
    """Do what `resolve` does, for a checkpoint that is open already."""
    return {name: tensor.read() for name, tensor in plan(checkpoint, table).tensors.items()}


@dataclass(frozen=True)
class Plan:
    """Which tensor of a checkpoint is which of a model; names, shapes and dtypes are checked, no numbers read.

    Attributes:
        tensors: under PyTorch's names, in its layout and the order of the table.
        naming: of the checkpoint.
        missing: the names, in that naming, of what the model has and the checkpoint has not.
        unexpected: the names of what the checkpoint has and the model has not.
    """

    tensors: dict[str, LazyTensor]
    naming: str
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()


def plan(
    checkpoint: Checkpoint, table: WeightTable, *, allow_missing: bool = False, ignore_unexpected: bool = False
) -> Plan:
    """Return where every tensor of a model is to be had in a checkpoint, in any known naming.

    Args:
        checkpoint: what somebody saved.
        table: of the model.
        allow_missing: whether the checkpoint may lack tensors, though not all of them.
        ignore_unexpected: whether it may have others.

    Raises:
        WeightsError: as `resolve` says.
    """
    where = checkpoint.label + (f", prefix {checkpoint.prefix!r}" if checkpoint.prefix else "")
    naming = naming_of(checkpoint.names, table)
    tensors: dict[str, LazyTensor] = {}
    problems: list[Problem] = []
    given: dict[str, str] = {}  # PyTorch name -> the name it was found under
    for name, value in checkpoint.items:
        entry = table.names(naming).get(name)
        foreign = entry or _in_other_naming(name, table)
        if foreign is None:
            continue
        if foreign.torch in given:
            detail = f"{name} is {foreign.torch}, and so is {given[foreign.torch]}"
            problems.append(Problem("duplicate", name, detail))
            continue
        given[foreign.torch] = name
        if entry is None:
            own = _name_in(naming, foreign, table)
            problems.append(Problem("mixed naming", name, f"{name}: the other names are {naming}'s, where it is {own}"))
            continue
        tensor, found_wrong = _checked(name, value, entry, naming)
        problems += found_wrong
        if tensor is not None:
            tensors[entry.torch] = tensor
    found = _missing_and_unexpected(checkpoint, table, naming, given)
    allowed = {"missing"} if allow_missing and tensors else set()
    allowed |= {"unexpected"} if ignore_unexpected else set()
    problems += [problem for problem in found if problem.kind not in allowed]
    if not problems:
        return Plan(
            {entry.torch: tensors[entry.torch] for entry in table.entries if entry.torch in tensors},
            naming,
            tuple(problem.name for problem in found if problem.kind == "missing"),
            tuple(problem.name for problem in found if problem.kind == "unexpected"),
        )

    message = f"{where}: {len(problems)} problems with its {len(checkpoint.items)} tensors for {table.model}"
    message = message.replace(": 1 problems", ": 1 problem")
    if not checkpoint.items:
        message = f"{where}: nothing there for {table.model}"
    if elsewhere := checkpoint.prefixes_where(lambda part: is_complete(part, table)):
        message += f"; a complete one is found with prefix={', '.join(map(repr, elsewhere))}"
    if other := _other_model(checkpoint, table):
        message += f"; they are those of {other}"
    raise WeightsError(message, sorted(problems, key=lambda problem: problem.kind))


def _other_model(checkpoint: Checkpoint, table: WeightTable) -> str | None:
    """Return which other known model the tensors fit, every one by name and shape."""
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in checkpoint.items}
    found = recognise(shapes)
    if found is None or found.table.model == table.model:
        return None
    naming = naming_of(shapes, found.table)
    expected = {name: entry.shape_in(naming) for name, entry in found.table.names(naming).items()}
    return found.table.model if shapes == expected else None


def _in_other_naming(name: str, table: WeightTable) -> Entry | None:
    return next((table.names(naming)[name] for naming in table.namings if name in table.names(naming)), None)


def _name_in(naming: str, entry: Entry, table: WeightTable) -> str:
    return next(name for name, other in table.names(naming).items() if other is entry)


def _checked(name: str, value: Any, entry: Entry, naming: str) -> tuple[LazyTensor | None, list[Problem]]:
    """Return a tensor in PyTorch's layout, or None and what is wrong with it."""
    try:
        tensor = stored(value)
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
    if problems:
        return None, problems
    dtype = tensor.dtype if entry.dtype is None else np.dtype(entry.dtype)

    def compute(array: np.ndarray) -> np.ndarray:
        return (entry.to_torch(array) if naming == FLAX else array).astype(dtype, copy=False)

    unchanged = dtype == tensor.dtype and (naming != FLAX or entry.layout == "same")
    return (tensor if unchanged else Computed(tensor, dtype, entry.shape, compute)), []


def _missing_and_unexpected(
    checkpoint: Checkpoint, table: WeightTable, naming: str, given: dict[str, str]
) -> list[Problem]:
    names = table.names(naming)
    missing = [name for name, entry in names.items() if entry.torch not in given]
    unexpected = sorted(name for name in checkpoint.names if _in_other_naming(name, table) is None)
    problems = []
    for place, name in enumerate(missing):
        entry = names[name]
        near = _nearest(name, unexpected, "the nearest there is") if place < _NEAREST_LIMIT else ""
        problems.append(Problem("missing", name, f"{name} {entry.shape_in(naming)}{near}"))
    for place, name in enumerate(unexpected):
        near = _nearest(name, list(names), "the nearest known is") if place < _NEAREST_LIMIT else ""
        problems.append(Problem("unexpected", name, f"{name}{near}"))
    return problems


def _nearest(name: str, names: list[str], words: str) -> str:
    close = closest(name, names[:_NEAREST_AMONG])
    return f"; {words} {close}" if close else ""
