"""PyTorch models: functions as modules, copies, and their weights by name."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from outlook_common.arrays import to_numpy
from outlook_parity.core.calls import argument_names, called
from outlook_parity.mapping.infer import TorchLeaf


def copied(model: torch.nn.Module) -> torch.nn.Module:
    """Return a copy.

    Raises:
        ValueError: it cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"the torch model cannot be copied, and is verified on copies: {reason}; does it keep a result of an "
            "earlier call?"
        ) from error


class FunctionModule(torch.nn.Module):
    """A function as a module without weights."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return the result of the function."""
        return called(self.function, named or inputs)


def as_torch_module(model: Any) -> torch.nn.Module:
    """Return a module, or a function as one.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(model, torch.nn.Module):
        return model
    if not callable(model):
        raise TypeError(f"the torch model must be a torch.nn.Module or a function, got {type(model).__name__}")
    return FunctionModule(model)


def argument_names_of(model: torch.nn.Module) -> frozenset[str] | None:
    """Return the names of the arguments that can be given by keyword; None if they are unknown."""
    return argument_names(model.function if isinstance(model, FunctionModule) else model.forward)


def kinds_of(model: torch.nn.Module) -> dict[str, str]:
    """Return the types of the modules by path."""
    return {path: type(module).__name__ for path, module in model.named_modules()}


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers by name."""
    return dict([*model.named_parameters(), *model.named_buffers()])


def compared_weights(model: torch.nn.Module) -> list[str]:
    """Return the names of the parameters and of BatchNorm's statistics, with its counts of batches."""
    kept = ("running_mean", "running_var", "num_batches_tracked")
    statistics = [name for name, _ in model.named_buffers() if name.endswith(kept)]
    return [*dict(model.named_parameters()), *statistics]


def torch_leaves(model: torch.nn.Module) -> dict[str, TorchLeaf]:
    """Return type and shape of `compared_weights` by name."""
    kinds, shapes = kinds_of(model), {name: tuple(tensor.shape) for name, tensor in weights_of(model).items()}
    return {name: TorchLeaf(kinds[name.rpartition(".")[0]], shapes[name]) for name in compared_weights(model)}


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as a NumPy array of the same dtype; it may share memory with the tensor."""
    return to_numpy(tensor.detach().resolve_neg())


def to_float64(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as a NumPy array in float64."""
    return to_array(tensor).astype(np.float64, copy=False)


def dtype_of(tensor: torch.Tensor) -> str:
    """Return the name of a tensor's dtype, as NumPy has it."""
    return str(tensor.dtype).removeprefix("torch.")
