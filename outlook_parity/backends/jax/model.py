"""What is given as a JAX model, as one; and what its weights are called."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as linen
import numpy as np
from flax import nnx

from outlook_parity.backends.jax.base import JaxModel, Values
from outlook_parity.backends.jax.linen import LinenModel
from outlook_parity.backends.jax.nnx import NNXModel, from_bridge


class FunctionModel(JaxModel):
    """A function of arrays, without weights."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.parameters, self.buffers, self.statistics = {}, {}, ()

    def prepared(self, dtype: np.dtype, *, training: bool, one_by_one: bool) -> "FunctionModel":
        """See `JaxModel`."""
        return self

    def call(self, parameters: Values, buffers: Values, inputs: Sequence[Any], **watching: Any) -> tuple[Any, Values]:
        """See `JaxModel`."""
        return self._function(*inputs), buffers

    def with_weights(self, weights: Mapping[str, np.ndarray]) -> Any:
        """See `JaxModel`."""
        return self._function


def jax_model(model: Any) -> JaxModel:
    """Return an NNX module, a pair of a Linen module and its variables, a bound Linen module, or a function as a model.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(model, nnx.Module):
        return NNXModel(model)
    if isinstance(model, linen.Module) and model.scope is not None:
        model = model.unbind()
    match model:
        case (nnx.bridge.ToLinen() as bridge, Mapping() as variables):
            return NNXModel(from_bridge(bridge, variables))
        case (linen.Module() as module, Mapping() as variables):
            return LinenModel(module, variables)
        case _ if callable(model) and not isinstance(model, linen.Module):
            return FunctionModel(model)
    raise TypeError(
        "the JAX model must be an nnx.Module, a pair (linen module, variables), a bound linen module or a function, "
        f"got {type(model).__name__}"
    )


def weights_of(model: JaxModel) -> Values:
    """Return the parameters and statistics by path."""
    return {**model.parameters, **{name: model.buffers[name] for name in model.statistics}}


def shapes_of(model: JaxModel) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters and statistics."""
    return {name: tuple(value.shape) for name, value in weights_of(model).items()}


def transposed_of(model: JaxModel) -> set[str]:
    """Return the paths of transposed convolutions that are told to take their kernel as PyTorch does."""
    return {path for path, part in model.modules().items() if getattr(part, "transpose_kernel", False)}
