"""Load, export and save the weights and the training state of a model."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from outlook_common.arrays import cast, contiguous, to_numpy, to_tensor
from outlook_common.volo import check_complete
from outlook_common.weights.checkpoint import Source
from outlook_common.weights.formats.registry import PathLike, write_arrays
from outlook_common.weights.identify import check_weights_of, table_for
from outlook_common.weights.match import resolve
from outlook_common.weights.tables.base import TORCH, WeightTable
from outlook_common.weights.training import MOMENTS, Training, read_training, refuse_moments, write_training
from outlook_torch.placement import sharded_like, whole, write_once


def load_weights(model: nn.Module, source: Source, *, prefix: str = "", use_ema: bool = False) -> None:
    """Load all parameters and buffers of `model`; on error, none.

    Args:
        model: one of this package, also after `fully_shard`; its parameters keep their dtypes, devices and shards;
            those on the meta device are then on the CPU.
        source: a path, or a mapping of arrays, in PyTorch's, Flax's or External-Attention-pytorch's naming.
        prefix: of the model's names in the source ("network.0.0.attn"); other names are ignored.
        use_ema: whether to take the averaged weights of a checkpoint.

    Raises:
        WeightsError: the source cannot be read or does not fit; all faults are reported together.
        OSError: the file cannot be opened.
        TypeError: `model` is not one of this package, or has other weights than its configuration says.
    """
    arrays = resolve(source, table_of(model), prefix=prefix, use_ema=use_ema)
    state = model.state_dict()
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in state.items()}
    tensors = {name: sharded_like(to_tensor(cast(array, dtypes[name])), state[name]) for name, array in arrays.items()}
    # There is nothing to copy into on the meta device.
    model.load_state_dict(tensors, assign=any(tensor.is_meta for tensor in state.values()))


def export_weights(model: nn.Module) -> dict[str, np.ndarray]:
    """Return a copy of every parameter and buffer of `model`, under PyTorch's names and in its layout.

    Weights that several ranks share are gathered, one after the other: all of these must call it. BatchNorm's
    statistics are those of the rank.
    """
    state = model.state_dict()
    return {entry.torch: contiguous(to_numpy(whole(state[entry.torch]))) for entry in table_of(model).entries}


def save_weights(model: nn.Module, path: PathLike) -> None:
    """Write the weights of `model` under PyTorch's names; the suffix of `path` decides the format.

    If several ranks share the weights, all of them must call it, and rank 0 writes.

    Raises:
        WeightsError: the suffix is unknown.
        OSError: the file cannot be written; an existing file is unchanged.
    """
    weights = export_weights(model)
    write_once(model, lambda: write_arrays(path, weights, {"format": "pt"}))


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
        TypeError: the optimizer keeps something else than those do.
        WeightsError: the suffix is unknown.
        OSError: the file cannot be written; an existing file is unchanged.
    """
    names = _trained(model, optimizer)
    states = {name: optimizer.state.get(parameter, {}) for name, parameter in names.items()}
    refuse_moments(key for state in states.values() for key in state if key not in (*MOMENTS, "step"))
    moments = {
        kind: {
            name: contiguous(to_numpy(whole(_or_zeros(states[name].get(kind), parameter))))
            for name, parameter in names.items()
        }
        for kind in _kinds(optimizer)
    }
    counted = _counted(optimizer, states.values()) if step is None else step
    training = Training(export_weights(model), moments, counted)
    write_once(model, lambda: write_training(path, training))


def load_training(model: nn.Module, optimizer: torch.optim.Optimizer, path: PathLike) -> int:
    """Load a file of either twin's `save_training`, all or nothing; return the number of steps.

    Args:
        model: one of this package; its parameters keep their dtypes and devices.
        optimizer: Adam, AdamW or SGD, of parameters of `model`; its hyperparameters stay.
        path: the file.

    Raises:
        WeightsError: the file does not fit the model or the optimizer.
        ValueError: the optimizer has other parameters.
        TypeError: the optimizer keeps something else than those do.
        OSError: the file cannot be opened.
    """
    names, kinds = _trained(model, optimizer), _kinds(optimizer)
    training = read_training(path, table_of(model), kinds, names)
    load_weights(model, training.weights)
    counted = {"step": torch.tensor(float(training.step))} if _counts(optimizer) else {}
    indices = {id(parameter): index for index, parameter in enumerate(_parameters(optimizer))}
    moments = training.moments
    state = {
        indices[id(parameter)]: {kind: sharded_like(to_tensor(moments[kind][name]), parameter) for kind in kinds}
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
    """Return the kinds of moments that an optimizer keeps from its first step on."""
    if any(group.get("amsgrad") for group in optimizer.param_groups):
        refuse_moments(["max_exp_avg_sq"])
    if _counts(optimizer):
        return ("exp_avg", "exp_avg_sq")
    if not isinstance(optimizer, torch.optim.SGD):
        refuse_moments([f"the state of {type(optimizer).__name__}"])
    return ("momentum_buffer",) if any(group["momentum"] for group in optimizer.param_groups) else ()


def _counts(optimizer: torch.optim.Optimizer) -> bool:
    return isinstance(optimizer, torch.optim.Adam)  # AdamW is one too


def _or_zeros(moment: torch.Tensor | None, parameter: nn.Parameter) -> torch.Tensor:
    """Return a moment, or zeros before the first step, from which that step is the same."""
    return torch.zeros_like(parameter) if moment is None else moment


def _counted(optimizer: torch.optim.Optimizer, states: Iterable[dict[str, torch.Tensor]]) -> int:
    if not _counts(optimizer):
        raise ValueError(f"{type(optimizer).__name__} counts no steps; give step=")
    steps = {int(state["step"]) if state else 0 for state in states}
    if len(steps) != 1:
        raise ValueError(f"the optimizer has made {sorted(steps)} steps, not the same for all parameters; give step=")
    return steps.pop()


def table_of(model: nn.Module) -> WeightTable:
    """Return the weight table of `model`; raise a TypeError if it has others than its configuration says."""
    check_complete(model)
    table = table_for(getattr(model, "config", model))
    check_weights_of({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, table, TORCH)
    return table
