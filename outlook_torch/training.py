"""Save and load the state of a training: weights, the optimizer's moments, the step."""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from outlook_common.arrays import contiguous, to_numpy, to_tensor
from outlook_common.weights.formats.registry import PathLike
from outlook_common.weights.train_states import ADAM, SGD
from outlook_common.weights.training import Training, common_count, not_carried, read_training, write_training
from outlook_torch.placement import gathered, put_like, write_once
from outlook_torch.weights import export_weights, load_weights, table_of

# Attributes of an optimizer that wraps another one: Accelerate's, PyTorch's ZeroRedundancyOptimizer, Lookahead.
_INNER = ("optimizer", "optim", "base_optimizer")


def save_training(
    model: nn.Module, optimizer: torch.optim.Optimizer, path: PathLike, *, step: int | None = None
) -> None:
    """Write weights, optimizer moments and step, to resume training in either framework.

    Hyperparameters, schedules and random streams are not written. If several ranks share the weights, all of them must
    call it, and rank 0 writes.

    Args:
        model: one of this package.
        optimizer: Adam, AdamW or SGD, of parameters of `model`.
        path: its suffix decides the format.
        step: how many steps were made; None means as many as the optimizer has counted, which SGD does not.

    Raises:
        ValueError: the optimizer has counted no steps, or not the same for all parameters, or has other parameters.
        TypeError: the optimizer is another one.
        WeightsError: the suffix is unknown.
        OSError: the file cannot be written; an existing file is unchanged.
    """
    kinds = _kinds(optimizer)
    names = _trained(model, optimizer)
    states = {name: optimizer.state.get(parameter, {}) for name, parameter in names.items()}
    if unknown := sorted({key for state in states.values() for key in state if key not in (*kinds, "step")}):
        raise not_carried(f"{type(optimizer).__name__} with {', '.join(unknown)}")
    moments = {
        kind: {
            name: contiguous(to_numpy(gathered(_or_zeros(states[name].get(kind), parameter))))
            for name, parameter in names.items()
        }
        for kind in kinds
    }
    counted = _counted(optimizer, states.values()) if step is None else step
    training = Training(export_weights(model), moments, counted)
    write_once(model, lambda: write_training(path, training))


def load_training(
    model: nn.Module, optimizer: torch.optim.Optimizer, path: PathLike, *, step: int | None = None
) -> int:
    """Load what either twin's `save_training` wrote, all or nothing; return the number of steps.

    Also training checkpoints of timm, Lightning and plain PyTorch, DCP folders, and Optax's states in Orbax's folders.

    Args:
        model: one of this package; its parameters keep their dtypes and devices.
        optimizer: Adam, AdamW or SGD, of parameters of `model`; its hyperparameters stay.
        path: the file or folder.
        step: how many steps were made; None means as many as the file says, which of SGD some do not.

    Raises:
        WeightsError: the file does not fit the model or the optimizer.
        ValueError: the optimizer has other parameters, or the file does not say how many steps were made.
        TypeError: the optimizer is another one.
        OSError: the file cannot be opened.
    """
    kinds = _kinds(optimizer)
    names = _trained(model, optimizer)
    training = read_training(path, table_of(model), dict.fromkeys(kinds, names), step)
    load_weights(model, training.weights)
    counted = {"step": torch.tensor(float(training.step))} if _is(optimizer, torch.optim.Adam) else {}
    indices = {id(parameter): index for index, parameter in enumerate(_parameters(optimizer))}
    moments = training.moments
    state = {
        indices[id(parameter)]: {kind: put_like(to_tensor(moments[kind][name]), parameter) for kind in kinds}
        | {key: value.clone() for key, value in counted.items()}
        for name, parameter in names.items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return training.step


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """Return the parameters of an optimizer by their names in the model."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = _parameters(optimizer)
    if foreign := sum(id(parameter) not in names for parameter in parameters):
        raise ValueError(f"{foreign} of the optimizer's {len(parameters)} parameters are not of this model")
    return {names[id(parameter)]: parameter for parameter in parameters}


def _kinds(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Return the kinds of moments that an optimizer keeps from its first step on.

    Raises:
        TypeError: it is not one of those whose state means the same in Optax.
    """
    name, groups = type(optimizer).__name__, optimizer.param_groups
    if _is(optimizer, torch.optim.Adam):  # AdamW too, which has Adam's step
        if any(group.get("amsgrad") for group in groups):
            raise not_carried(f"{name} with amsgrad=True, which also keeps max_exp_avg_sq")
        return ADAM
    if _is(optimizer, torch.optim.SGD):
        has_momentum = any(group["momentum"] for group in groups)
        if has_momentum and any(group["dampening"] for group in groups):
            raise not_carried(f"{name} with dampening, which scales momentum_buffer and which Optax lacks")
        return SGD if has_momentum else ()
    inner = next((attribute for attribute in _INNER if hasattr(optimizer, attribute)), None)
    raise not_carried(name, instead="" if inner is None else f"pass the one it wraps, its .{inner}")


def _is(optimizer: torch.optim.Optimizer, kind: type[torch.optim.Optimizer]) -> bool:
    """Whether an optimizer makes the steps of this kind: it is one, and no subclass with steps of its own."""
    return isinstance(optimizer, kind) and _step_of(type(optimizer)) is _step_of(kind)


def _step_of(kind: type[torch.optim.Optimizer]) -> Any:
    return inspect.unwrap(kind.step)  # PyTorch wraps it when the first one is made


def _or_zeros(moment: torch.Tensor | None, parameter: nn.Parameter) -> torch.Tensor:
    """Return a moment, or zeros before the first step, from which that step is the same."""
    return torch.zeros_like(parameter) if moment is None else moment


def _counted(optimizer: torch.optim.Optimizer, states: Iterable[dict[str, torch.Tensor]]) -> int:
    if not _is(optimizer, torch.optim.Adam):
        raise ValueError(f"{type(optimizer).__name__} counts no steps; give step=")
    return common_count(int(state["step"]) if state else 0 for state in states)
