"""Save and load the state of a training: weights, the optimizer's moments, the step."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from flax import nnx

from outlook_common.arrays import cast, contiguous
from outlook_common.weights.formats.registry import PathLike
from outlook_common.weights.tables.base import FLAX, Entry
from outlook_common.weights.training import Training, common_count, not_carried, read_training, write_training
from outlook_jax.optimizer_parts import Part, parts_of
from outlook_jax.placement import gathered, put_like, write_once
from outlook_jax.weights import export_weights, load_weights, path_name, table_of


def save_training(model: nnx.Module, optimizer: nnx.Optimizer[Any], path: PathLike, *, step: int | None = None) -> None:
    """Write weights, optimizer moments and step, to resume training in either framework.

    Hyperparameters, schedules and random streams are not written. If several processes share the weights, all of them
    must call it, and the first writes.

    Args:
        model: one of this package.
        optimizer: of `optax.adam`, `adamw` or `sgd`, of parameters of `model`; alone, in a chain, or in a wrapper that
            leaves its state whole: `masked`, `partition`, `inject_hyperparams`, `apply_if_finite`, `MultiSteps`.
        path: its suffix decides the format.
        step: how many steps were made; None means as many as the optimizer has counted.

    Raises:
        ValueError: the optimizer has other parameters, has not made the same number of steps for all, or is amid the
            gradients that `MultiSteps` accumulates for one step.
        TypeError: the optimizer is another one, or in another wrapper.
        WeightsError: the suffix is unknown.
        OSError: the file cannot be written; an existing file is unchanged.
    """
    parts = list(parts_of(optimizer))
    _check_whole_step(parts)
    moments: dict[str, dict[str, np.ndarray]] = {}
    for kind, entry, variable in _moments(model, optimizer, parts):
        moments.setdefault(kind, {})[entry.torch] = contiguous(entry.to_torch(gathered(variable.get_value())))
    counted = _counted(optimizer, parts) if step is None else step
    training = Training(export_weights(model), moments, counted)
    write_once(model, lambda: write_training(path, training))


def load_training(
    model: nnx.Module,
    optimizer: nnx.Optimizer[Any],
    path: PathLike,
    *,
    step: int | None = None,
    rngs: nnx.Rngs | None = None,
) -> int:
    """Load what either twin's `save_training` wrote, all or nothing; return the number of steps.

    Also training checkpoints of timm, Lightning and plain PyTorch, DCP folders, and Optax's states in Orbax's folders.

    Args:
        model: one of this package; its parameters keep their dtypes and shardings.
        optimizer: see `save_training`; its hyperparameters stay, and what it counts is set to the number of steps.
        path: the file or folder.
        step: how many steps were made; None means as many as the file says, which of SGD some do not.
        rngs: the random streams of an abstract model; see `load_weights`.

    Raises:
        WeightsError: the file does not fit the model or the optimizer.
        ValueError: the optimizer has other parameters, the file does not say how many steps were made, or an abstract
            model's random streams are not given.
        TypeError: the optimizer is another one, or in another wrapper.
        OSError: the file cannot be opened.
    """
    parts = list(parts_of(optimizer))
    slots = list(_moments(model, optimizer, parts))
    kept: dict[str, set[str]] = {}
    for kind, entry, _ in slots:
        kept.setdefault(kind, set()).add(entry.torch)
    training = read_training(path, table_of(model), kept, step)
    load_weights(model, training.weights, rngs=rngs)
    for kind, entry, variable in slots:
        old = variable.get_value()
        array = contiguous(cast(entry.to_flax(training.moments[kind][entry.torch]), old.dtype.name))
        variable.set_value(put_like(array, old))
    for part in parts:
        for variable in part.zeroed:
            old = variable.get_value()
            variable.set_value(put_like(np.zeros(old.shape, old.dtype), old))
    for variable in (optimizer.step, *(count for part in parts for count in part.counts)):
        old = variable.get_value()
        variable.set_value(put_like(np.asarray(training.step, old.dtype), old))
    return training.step


def _moments(
    model: nnx.Module, optimizer: nnx.Optimizer[Any], parts: list[Part]
) -> Iterator[tuple[str, Entry, nnx.Variable[Any]]]:
    """Yield (kind, parameter, variable) of every moment that an optimizer keeps."""
    if getattr(optimizer, "model", model) is not model:
        raise ValueError(f"the {type(optimizer).__name__} is of another model")
    entries = table_of(model).names(FLAX)
    kept_by: dict[str, Part] = {}
    for part in parts:
        for kind, tree in part.moments.items():
            for path, variable in nnx.to_flat_state(tree):
                if not hasattr(variable.get_value(), "shape"):  # masked
                    continue
                if (name := path_name(path)) not in entries:
                    raise ValueError(f"the optimizer's {name} is not of this model")
                if kept_by.setdefault(name, part) is not part:
                    raise not_carried(f"{kept_by[name].name} and {part.name} of the same parameters")
                yield kind, entries[name], variable


def _counted(optimizer: nnx.Optimizer[Any], parts: list[Part]) -> int:
    """Return the number of steps: those that Adam has counted, for they decide the next one; else those of wrappers."""
    for counts in (
        [part.step for part in parts if part.moments and part.step is not None],
        [part.step for part in parts if part.step is not None],
        [optimizer.step],
    ):
        if counts:
            return common_count(int(gathered(count.get_value())) for count in counts)
    raise AssertionError("the last has one")


def _check_whole_step(parts: list[Part]) -> None:
    for part in parts:
        if part.accumulated is not None and (count := int(gathered(part.accumulated.get_value()))):
            raise ValueError(
                f"{part.name} has accumulated {count} gradients for its next step, which are not carried; save when it "
                "has just made a step"
            )
