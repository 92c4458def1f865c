"""Two models as a pair of twins: a runner for each, the names that correspond, and the levels that can be compared."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from flax import linen, nnx

from outlook_common.arrays import is_floating
from outlook_parity.backends.jax.base import JaxModel
from outlook_parity.backends.jax.model import FunctionModel, as_jax_model, output_shapes
from outlook_parity.backends.jax.runner import JaxRunner
from outlook_parity.backends.names import names_of_models
from outlook_parity.backends.order import call_order
from outlook_parity.backends.torch.model import FunctionModule, as_torch_module, compared_weights
from outlook_parity.backends.torch.runner import TorchRunner
from outlook_parity.core.errors import user_code_errors
from outlook_parity.core.layout import Axes, fitting_axes
from outlook_parity.core.request import Inputs, Request
from outlook_parity.core.task import Task, mean_square, no_task
from outlook_parity.mapping.names import Names
from outlook_parity.mapping.structure import Order
from outlook_parity.mapping.user import NameMap, torch_axes_of
from outlook_parity.models.registry import KnownModel, known_model


@dataclass(frozen=True)
class Pair:
    """Two twins.

    Attributes:
        torch: PyTorch's.
        jax: JAX's.
        names: what corresponds.
        refused: level -> why it cannot be compared.
    """

    torch: TorchRunner
    jax: JaxRunner
    names: Names
    refused: dict[str, str]


def make_pair(torch_model: Any, jax_model: Any, inputs: Inputs, name_map: NameMap) -> Pair:
    """Return two models as a pair of twins.

    Raises:
        TypeError: a model is no module, no function, and no pair of a Linen module and its variables.
        ValueError: `torch_axes` has another number of axes than the inputs.
    """
    module, model = _models(torch_model, jax_model)
    known = _known_pair(module, model, inputs, name_map)
    if known is None:
        return _user_pair(module, model, inputs, name_map)
    return _own_pair(module, model, inputs, name_map, known)


def _models(torch_model: Any, jax_model: Any) -> tuple[torch.nn.Module, JaxModel]:
    if isinstance(torch_model, nnx.Module | linen.Module):
        raise TypeError(f"the torch model is a {type(torch_model).__name__} of Flax: are the two exchanged?")
    module = as_torch_module(torch_model)
    if isinstance(jax_model, torch.nn.Module):
        raise TypeError(f"the JAX model is a {type(jax_model).__name__} of PyTorch: are the two exchanged?")
    return module, as_jax_model(jax_model)


def _known_pair(module: torch.nn.Module, model: JaxModel, inputs: Inputs, name_map: NameMap) -> KnownModel | None:
    """Return how both are verified if they are twins of this package, and no names are given for them."""
    known = known_model(module)
    twin = known_model(getattr(model, "module", None))
    if known is None or twin is None or type(known.config) is not type(twin.config):
        return None
    if name_map.weights or name_map.modules:
        return None
    if not all(map(is_floating, inputs.values())):
        kinds = ", ".join(f"{name} of {array.dtype}" for name, array in inputs.items())
        raise TypeError(f"{type(module).__name__} takes floating-point numbers, got {kinds}")
    return known


def _own_pair(module: torch.nn.Module, model: JaxModel, inputs: Inputs, name_map: NameMap, known: KnownModel) -> Pair:
    names = known.names()
    shape = next(iter(inputs.values())).shape
    task = _per_seed(lambda rng: known.task(shape, rng))
    axes = torch_axes_of(name_map, inputs, known.torch_axes)
    return Pair(TorchRunner(module, axes, task), JaxRunner(model, names, task), names, _refused(module, model))


def _user_pair(module: torch.nn.Module, model: JaxModel, inputs: Inputs, name_map: NameMap) -> Pair:
    axes = torch_axes_of(name_map, inputs, None)
    order = partial(call_order_of, module, model, inputs, axes)
    names = names_of_models(module, model, name_map, order, same_weights=True)
    out_axes = _output_axes(module, model, inputs, axes, name_map)
    task = _per_seed(lambda rng: _mean_square(output_shapes(model, inputs), rng))
    compared = [name for name in compared_weights(module) if name in set(names.expected)]
    runner = TorchRunner(module, axes, task, out_axes, compared)
    return Pair(runner, JaxRunner(model, names, task), names, _refused(module, model))


def call_order_of(
    module: torch.nn.Module, model: JaxModel, inputs: Inputs, axes: Mapping[str, Axes]
) -> tuple[Order, Order]:
    """Return when each module is first called."""
    request = Request(inputs, "float32", "cpu", 0, "float32")
    return call_order(TorchRunner(module, axes, no_task), JaxRunner(model, Names([], {}), no_task), request)


def _refused(module: torch.nn.Module, model: JaxModel) -> dict[str, str]:
    if isinstance(module, FunctionModule) or isinstance(model, FunctionModel):
        return dict.fromkeys(("layers", "training"), "a plain function has no modules and no weights")
    if model.own_dropout:
        return {"training": f"{model.own_dropout} draws dropout of its own, which the twins cannot share"}
    return {}


def _per_seed(make: Callable[[np.random.Generator], Task]) -> Callable[[Request], Task]:
    """Return a function from requests to tasks, which are made once per seed."""

    @cache
    def task(seed: int) -> Task:
        return make(np.random.default_rng(seed))

    return lambda request: task(request.seed)


def _mean_square(shapes: Mapping[str, Any], rng: np.random.Generator) -> Task:
    """Return the mean square of all floating-point outputs from random targets."""
    floating = {name: output.shape for name, output in shapes.items() if jnp.issubdtype(output.dtype, jnp.floating)}
    return mean_square({name: rng.standard_normal(shape) for name, shape in floating.items()})


def _output_axes(
    module: torch.nn.Module, model: JaxModel, inputs: Inputs, axes: Mapping[str, Axes], name_map: NameMap
) -> dict[str, Axes]:
    """Return the order in which JAX has the axes of each output, where it is another one than PyTorch's.

    As the map says, else by shapes where they do not fit as they are; never by numbers: a twin that exchanges axes is
    wrong.
    """
    torch_outputs = _torch_outputs(module, inputs, axes)
    with user_code_errors("JAX", {name: list(array.shape) for name, array in inputs.items()}):
        jax_shapes = {name: output.shape for name, output in output_shapes(model, inputs).items()}
    if not torch_outputs and not jax_shapes:
        raise TypeError("both models return nothing that could be compared")
    if unknown := name_map.out_axes.keys() - torch_outputs.keys():
        raise ValueError(
            f"out_axes names {', '.join(sorted(unknown))}; the torch model gives {', '.join(torch_outputs)}"
        )
    orders: dict[str, Axes] = {}
    for name, output in torch_outputs.items():
        fitting = fitting_axes(output.shape, jax_shapes.get(name, ()))
        order = name_map.out_axes.get(name, fitting[0] if fitting else None)
        if order is not None and sorted(order) != list(range(output.ndim)):
            raise ValueError(f"out_axes of {name}, in torch of shape {output.shape}, must not be {list(order)}")
        if order is not None and order != tuple(range(output.ndim)):
            orders[name] = order
    return orders


def _torch_outputs(module: torch.nn.Module, inputs: Inputs, axes: Mapping[str, Axes]) -> Mapping[str, np.ndarray]:
    request = Request(inputs, "float32", "cpu", 0, "float32")
    with user_code_errors("torch", {name: [inputs[name].shape[i] for i in axes[name]] for name in inputs}):
        return TorchRunner(module, axes, no_task).run(request, gradients=False).outputs
