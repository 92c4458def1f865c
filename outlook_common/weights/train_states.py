"""Find weights, moments and step in what training programs save.

| saved by | weights | moments | step |
|---|---|---|---|
| `save_training` | `model.<name>` | `optimizer.<kind>.<name>` | `optimizer.step` |
| PyTorch, by name: DCP's `get_state_dict` | anywhere | `state.<name>.<kind>` | `state.<name>.step` |
| PyTorch, by number: timm, Lightning | anywhere | `state.<number>.<kind>` | likewise, or `global_step` |
| Optax, in Orbax's folders or Flax's files | anywhere | `mu.<path>` and `nu.<path>`, or `trace.<path>` | `count` |
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from outlook_common.text import listed
from outlook_common.weights.checkpoint import AVERAGED, Checkpoint, Shape
from outlook_common.weights.errors import WeightsError
from outlook_common.weights.io.lazy import as_lazy
from outlook_common.weights.parameter_order import names_of_numbers
from outlook_common.weights.tables.base import WeightTable

MODEL, OPTIMIZER, STEP = "model", "optimizer", "step"

# What is carried: optimizer -> its kinds of moments, as PyTorch calls them.
ADAM, SGD = ("exp_avg", "exp_avg_sq"), ("momentum_buffer",)
KINDS = (*ADAM, *SGD)

# Optax's fields -> kinds of moments.
_FIELDS = {"mu": ADAM[0], "nu": ADAM[1], "trace": SGD[0]}
# Steps of names below which there are no weights, but what has the names of weights.
_BESIDE = {*KINDS, *_FIELDS, *AVERAGED, "acc_grads", "ema", "ema_params"}
# Kinds of moments -> hyperparameter that only PyTorch's optimizers with these moments have: RAdam, LAMB and others keep
# moments of the same names.
_MARKS = {ADAM: "amsgrad", SGD: "dampening"}

_IN_TORCH = re.compile(r"((?:.+?\.)?)state\.(.+)\.([^.]+)")
_GROUPS = re.compile(r"((?:.+?\.)?)param_groups(?:\.(\d+)\.([^.]+))?")
_IN_OPTAX = re.compile(rf"((?:.+?\.)?)({'|'.join(_FIELDS)})\.(?:params\.)?(.+)")


@dataclass(frozen=True)
class TrainState:
    """What was found, not yet matched to a model.

    Attributes:
        weights: of the model.
        moments: kind -> moments by the names of the parameters.
        counts: numbers of steps, those that decide.
    """

    weights: Checkpoint
    moments: Mapping[str, Checkpoint]
    counts: tuple[int, ...]


def find_train_state(checkpoint: Checkpoint, table: WeightTable, trained: Collection[str]) -> TrainState:
    """Find what a training needs to go on, in whatever layout it was saved.

    Args:
        checkpoint: the whole file.
        table: of the model.
        trained: PyTorch's names of the parameters that the optimizer has.

    Raises:
        WeightsError: it is no training, holds several models or optimizers, an optimizer that is not carried, or
            parameters by numbers of which it does not show which they are.
    """
    for layout in (_own, _in_torch, _in_optax):
        if (found := layout(checkpoint, table, trained)) is not None:
            return found
    raise WeightsError(
        f"{checkpoint.label}: not a training: it has no step count {OPTIMIZER}.{STEP} of save_training, no state with "
        f"{listed(KINDS)} of PyTorch's, and no {listed(_FIELDS)} of Optax's"
    )


def _own(checkpoint: Checkpoint, table: WeightTable, trained: Collection[str]) -> TrainState | None:
    optimizer = checkpoint.below(OPTIMIZER)
    kinds = {name.split(".")[0] for name in optimizer.names} - {STEP}
    if STEP not in optimizer.names or not kinds <= set(KINDS):
        return None
    counts = _counts(optimizer, lambda name: name == STEP)
    moments = {kind: checkpoint.below(f"{OPTIMIZER}.{kind}") for kind in kinds}
    return TrainState(checkpoint.below(MODEL), moments, counts)


# PyTorch's optimizers.


def _in_torch(checkpoint: Checkpoint, table: WeightTable, trained: Collection[str]) -> TrainState | None:
    state = [(match[1], match[2], match[3], value) for match, value in _matches(checkpoint, _IN_TORCH)]
    roots = {root for root, _, kind, _ in state if kind in KINDS}
    roots |= {match[1] for match, _ in _matches(checkpoint, _GROUPS)}
    if not roots:
        return None
    if len(roots) > 1:
        raise WeightsError(f"{checkpoint.label}: it has {len(roots)} optimizers, {listed(sorted(roots))}; expected one")
    root = roots.pop()
    groups = _groups(checkpoint, root)
    kept = [(parameter, kind, value) for at, parameter, kind, value in state if at == root and value is not None]
    kinds = {kind for _, kind, _ in kept} - {STEP}
    _check_marks(checkpoint, kinds, groups)
    shapes = {parameter: tuple(getattr(value, "shape", ())) for parameter, kind, value in kept if kind != STEP}
    names = _names(checkpoint, table, trained, groups, shapes)
    moments = {
        kind: _part(checkpoint, f"{root}state", ((names[key], value) for key, kind_, value in kept if kind_ == kind))
        for kind in kinds
    }
    counts = _counts(checkpoint, lambda name: (match := _IN_TORCH.fullmatch(name)) is not None and match[3] == STEP)
    counts = counts or _counts(checkpoint, lambda name: name == "global_step")
    return TrainState(_weights(checkpoint, table), moments, counts)


@dataclass(frozen=True)
class _Group:
    """A group of parameters: its hyperparameters, and the numbers or names of its parameters."""

    hyperparameters: Mapping[str, Any]

    @property
    def parameters(self) -> list[str]:
        found = self.hyperparameters.get("params")
        return [str(key) for key in found] if isinstance(found, list | tuple) else []

    @property
    def names(self) -> list[str]:
        """What `torch.optim` keeps if it is given `named_parameters()`."""
        found = self.hyperparameters.get("param_names")
        return [str(name) for name in found] if isinstance(found, list | tuple) else []

    @property
    def decays(self) -> bool:
        return bool(self.hyperparameters.get("weight_decay"))


def _groups(checkpoint: Checkpoint, root: str) -> list[_Group]:
    """Return the groups of parameters; none where the file does not show them, as in DCP folders."""
    groups: dict[int, dict[str, Any]] = {}
    for match, value in _matches(checkpoint, _GROUPS):
        if match[1] == root and match[2] is not None:
            groups.setdefault(int(match[2]), {})[match[3]] = value
    return [_Group(groups[index]) for index in sorted(groups)]


def _check_marks(checkpoint: Checkpoint, kinds: Collection[str], groups: Sequence[_Group]) -> None:
    mark = next((mark for own, mark in _MARKS.items() if set(own) == set(kinds)), None)
    if mark is not None and any(mark not in group.hyperparameters for group in groups):
        known = listed(name for name in groups[0].hyperparameters if not name.startswith("param"))
        raise WeightsError(
            f"{checkpoint.label}: it has the moments {listed(sorted(kinds))} of another optimizer than PyTorch's Adam, "
            f"AdamW and SGD, without {mark} among its hyperparameters {known}"
        )
    if any(group.hyperparameters.get("dampening") for group in groups):
        raise WeightsError(f"{checkpoint.label}: its SGD has dampening, which scales momentum_buffer and Optax lacks")


def _names(
    checkpoint: Checkpoint,
    table: WeightTable,
    trained: Collection[str],
    groups: Sequence[_Group],
    shapes: Mapping[str, Shape],
) -> dict[str, str]:
    """Return the numbers or names that an optimizer knows its parameters by -> their names in the model."""
    if not all(key.isdigit() for key in shapes):
        return _without_root(shapes, table)
    if groups and all(group.names for group in groups):
        numbered = {key: name for group in groups for key, name in zip(group.parameters, group.names, strict=True)}
        named = _without_root(numbered.values(), table)
        return {key: named[name] for key, name in numbered.items()}
    order = [(entry.torch, entry.shape) for entry in table.entries if entry.torch in set(trained)]
    numbers = [(group.parameters, group.decays) for group in groups]
    if not numbers or not all(parameters for parameters, _ in numbers):  # DCP pickles them
        numbers = [(sorted(shapes, key=int), False)]
    try:
        return names_of_numbers(numbers, shapes, order)
    except ValueError as error:
        raise WeightsError(
            f"{checkpoint.label}: its optimizer numbers its parameters, and {error}. Names would tell: "
            "torch.optim takes model.named_parameters(), get_optimizer_state_dict gives them"
        ) from error


def _without_root(names: Iterable[str], table: WeightTable) -> dict[str, str]:
    """Return names -> the same without what all have before the names of the model, as "model." of Lightning."""
    names = list(names)
    root = _commonest(_roots(names, table))
    return {name: name.removeprefix(root) for name in names}


# Optax's states.


def _in_optax(checkpoint: Checkpoint, table: WeightTable, trained: Collection[str]) -> TrainState | None:
    found = [(match, value) for match, value in _matches(checkpoint, _IN_OPTAX) if not isinstance(value, str)]
    if not found:
        return None
    if any(_counts(checkpoint, lambda name: name.split(".")[-1] == "mini_step")):
        raise WeightsError(
            f"{checkpoint.label}: MultiSteps has accumulated gradients for its next step, which are not carried; save "
            "when it has just made a step"
        )
    kinds = {_FIELDS[match[2]] for match, _ in found}
    moments = {
        kind: _part(checkpoint, kind, ((match[3], value) for match, value in found if _FIELDS[match[2]] == kind))
        for kind in kinds
    }
    beside = {f"{match[1]}count" for match, _ in found}
    deciding: tuple[Callable[[str], bool], ...] = (
        lambda name: name in beside,
        lambda name: name.split(".")[-1] == "gradient_step",
        lambda name: name.split(".")[-1] == "count",
        lambda name: name.split(".")[-1] == STEP,
    )
    counts = next(filter(None, (_counts(checkpoint, which) for which in deciding)), ())
    return TrainState(_weights(checkpoint, table), moments, counts)


# What all have in common.


def _weights(checkpoint: Checkpoint, table: WeightTable) -> Checkpoint:
    """Return the part with the model's weights: the one with all of them, else the one with most."""
    found = _roots(checkpoint.names, table)
    roots = {root: count for root, count in found.items() if not _BESIDE & set(root.split("."))}
    complete = sorted(root for root, count in roots.items() if count == len(table.entries))
    if len(complete) > 1:
        where = listed(root.removesuffix(".") for root in complete)
        raise WeightsError(f"{checkpoint.label}: it has {len(complete)} models like {table.model}: {where}")
    return checkpoint.below(_commonest(roots).removesuffix("."))


def _roots(names: Iterable[str], table: WeightTable) -> Counter[str]:
    """Return what names have before those of the model -> how many do, in the naming in which there are most."""
    best: Counter[str] = Counter()
    names = list(names)
    for naming in table.namings:
        known = table.names(naming)
        found: Counter[str] = Counter()
        for name in names:
            starts = (0, *(match.end() for match in re.finditer(r"\.", name)))
            found.update(name[:start] for start in starts if name[start:] in known)
        if max(found.values(), default=0) > max(best.values(), default=0):
            best = found
    return best


def _commonest(roots: Mapping[str, int]) -> str:
    """Return the one that most names have, of several the shortest; "" if there is none."""
    return min(roots, key=lambda root: (-roots[root], len(root)), default="")


def _matches(checkpoint: Checkpoint, pattern: re.Pattern[str]) -> list[tuple[re.Match[str], Any]]:
    return [(match, value) for name, value in checkpoint.items if (match := pattern.fullmatch(name)) is not None]


def _part(checkpoint: Checkpoint, prefix: str, items: Iterable[tuple[str, Any]]) -> Checkpoint:
    part = tuple(items)
    return replace(checkpoint, prefix=prefix, items=part, everything=part)


def _counts(checkpoint: Checkpoint, which: Callable[[str], bool]) -> tuple[int, ...]:
    """Return the values of these names that are integers, or whole numbers as PyTorch counts."""
    found = [_number(value) for name, value in checkpoint.items if which(name)]
    return tuple(int(number) for number in found if np.isfinite(number) and number == int(number))


def _number(value: Any) -> float:
    """Return a single number; NaN for what is none."""
    try:
        tensor = as_lazy(value)
    except TypeError:
        return math.nan
    return float(tensor.read()) if tensor.shape == () and tensor.dtype.kind in "iuf" else math.nan
