"""Two models as a pair of twins: what corresponds to what in them, and what can be compared."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen, nnx

from outlook_common.arrays import is_floating, to_numpy
from outlook_parity.backends.jax.base import JaxModel, Values
from outlook_parity.backends.jax.model import FunctionModel, jax_model, shapes_of, transposed_of, weights_of
from outlook_parity.backends.jax.runner import JaxRunner
from outlook_parity.backends.jax.settings import jax_absence, jax_device, jax_products, jax_products_absence
from outlook_parity.backends.torch.model import FunctionModule, compared_weights, torch_leaves, torch_module
from outlook_parity.backends.torch.runner import TorchRunner
from outlook_parity.backends.torch.settings import torch_absence, torch_device, torch_products, torch_products_absence
from outlook_parity.core.errors import user_code_errors
from outlook_parity.core.precision import PRECISIONS
from outlook_parity.core.pytree import named_leaves
from outlook_parity.core.recorder import fitting_axes
from outlook_parity.core.request import Inputs, Request
from outlook_parity.core.task import OUTPUT, Subject, Task, is_array, mean_square, no_task, subject_of
from outlook_parity.mapping.infer import derive_names
from outlook_parity.mapping.names import Axes, Names, names_of_table
from outlook_parity.mapping.user import NameMap, torch_axes_of


@dataclass(frozen=True)
class Pair:
    """Two twins, PyTorch's first.

    Attributes:
        torch: PyTorch's.
        jax: JAX's.
        names: what corresponds.
        refused: level -> why it cannot be had of this pair.
    """

    torch: TorchRunner
    jax: JaxRunner
    names: Names
    refused: dict[str, str]


def make_pair(torch_model: Any, jax_twin_model: Any, inputs: Inputs, given: NameMap) -> Pair:
    """Return two models as twins.

    Raises:
        TypeError: a model is no module, no function, and no pair of a Linen module and its variables.
        ValueError: `torch_axes` has another number of axes than the inputs.
    """
    if isinstance(torch_model, nnx.Module | linen.Module):
        raise TypeError(f"the torch model is a {type(torch_model).__name__} of Flax: are the two exchanged?")
    module = torch_module(torch_model)
    if isinstance(jax_twin_model, torch.nn.Module):
        raise TypeError(f"the JAX model is a {type(jax_twin_model).__name__} of PyTorch: are the two exchanged?")
    model = jax_model(jax_twin_model)
    config = getattr(module, "config", module)
    ours = hasattr(getattr(model, "module", None), "config") and not (given.weights or given.modules)
    subject = subject_of(config) if ours else None
    if subject and not all(map(is_floating, inputs.values())):
        kinds = ", ".join(f"{name} of {array.dtype}" for name, array in inputs.items())
        raise TypeError(f"{type(module).__name__} takes floating-point numbers, got {kinds}")
    names = _derived(module, model, given) if subject is None else names_of_table(config)
    axes = torch_axes_of(given, inputs, subject.torch_axes if subject else None)
    out_axes = {} if subject else _out_axes(module, model, inputs, axes, given)
    task = _task(subject, config, inputs, lambda: _out_shapes(model, inputs))
    refused = {}
    if isinstance(module, FunctionModule) or isinstance(model, FunctionModel):
        refused = dict.fromkeys(("layers", "training"), "a plain function has no modules and no weights")
    elif model.own_dropout:
        refused = {"training": f"{model.own_dropout} draws dropout of its own, which the twins cannot share"}
    expected = set(names.expected)
    compared = None if subject else [name for name in compared_weights(module) if name in expected]
    return Pair(TorchRunner(module, axes, task, out_axes, compared), JaxRunner(model, names, task), names, refused)


def load_torch_weights(jax_twin_model: Any, torch_model: torch.nn.Module, names: NameMap | None = None) -> Any:
    """Give a JAX model the parameters and running statistics of its PyTorch twin, whatever either is.

    Args:
        jax_twin_model: an NNX module, which is changed; or a pair of a Linen module and its variables.
        torch_model: its twin.
        names: what corresponds to what, where Flax's usual names do not say it.

    Returns:
        The NNX module, or the pair with new variables.

    Raises:
        ValueError: a weight has no counterpart, or another shape; all of them are named.
    """
    model = jax_model(jax_twin_model)
    derived = _derived(torch_model, model, names or NameMap())
    state, wrong = torch_model.state_dict(), []
    loaded: dict[str, np.ndarray] = {}
    for flax, value in weights_of(model).items():
        weight = derived.by_flax[flax]
        if weight.torch not in state:
            wrong.append(f"{flax} has no counterpart in torch{derived.hint(flax)}")
            continue
        array = weight.to_flax(to_numpy(state[weight.torch]))
        if array.shape != value.shape:
            wrong.append(f"{flax} has shape {value.shape}, {weight.torch} in its layout {array.shape}")
        loaded[flax] = array.astype(value.dtype)
    taken = {derived.by_flax[flax].torch for flax in loaded}
    wrong += [
        f"{name} of torch has no counterpart in JAX{derived.hint(name)}"
        for name in derived.expected
        if name not in taken and name in state
    ]
    if wrong:
        raise ValueError("weights that do not correspond: " + "; ".join(dict.fromkeys(wrong)))
    return model.with_weights(loaded)


def _task(
    subject: Subject | None, config: Any, inputs: Inputs, out_shapes: Callable[[], Mapping[str, Any]]
) -> Callable[[Request], Task]:
    @cache
    def task(seed: int) -> Task:
        rng = np.random.default_rng(seed)
        if subject is not None:
            return subject.task(config, next(iter(inputs.values())).shape, rng)
        floating = {name: s.shape for name, s in out_shapes().items() if jnp.issubdtype(s.dtype, jnp.floating)}
        return mean_square({name: rng.standard_normal(shape) for name, shape in floating.items()})

    return lambda request: task(request.seed)


def _out_shapes(model: JaxModel, inputs: Inputs) -> dict[str, Any]:
    """Return shape and dtype of each output of the JAX model."""
    prepared = model.prepared(np.dtype(np.float32), training=False, one_by_one=False)
    given = [jax.ShapeDtypeStruct(a.shape, np.float32 if is_floating(a) else a.dtype) for a in inputs.values()]  # type: ignore[no-untyped-call]

    def call(parameters: Values, buffers: Values, *inputs: Any) -> Any:
        output = prepared.call(parameters, buffers, inputs)[0]
        return {name: jnp.asarray(leaf) for name, leaf in named_leaves(output, is_array, OUTPUT).items()}

    return dict(jax.eval_shape(call, prepared.parameters, prepared.buffers, *given))


def _out_axes(
    module: torch.nn.Module, model: JaxModel, inputs: Inputs, axes: Mapping[str, Axes], given: NameMap
) -> dict[str, Axes]:
    """Return for each output in which order JAX has its axes, where that is another one: as given, else what the shapes
    say if they do not fit as they are. The numbers are not asked: a twin that exchanges axes is wrong.
    """
    request = Request(inputs, "float32", "cpu", 0, "float32")
    with user_code_errors("torch", {name: [inputs[name].shape[i] for i in axes[name]] for name in inputs}):
        outputs = TorchRunner(module, axes, no_task).run(request, gradients=False).outputs
    with user_code_errors("JAX", {name: list(array.shape) for name, array in inputs.items()}):
        shapes = {name: leaf.shape for name, leaf in _out_shapes(model, inputs).items()}
    if not outputs and not shapes:
        raise TypeError("both models return nothing that could be compared")
    if unknown := given.out_axes.keys() - outputs.keys():
        raise ValueError(f"out_axes names {', '.join(sorted(unknown))}; the torch model gives {', '.join(outputs)}")
    found: dict[str, Axes] = {}
    for name, output in outputs.items():
        fitting = fitting_axes(output.shape, shapes.get(name, ()))
        order = given.out_axes.get(name, fitting[0] if fitting else None)
        if order is not None and sorted(order) != list(range(output.ndim)):
            raise ValueError(f"out_axes of {name}, in torch of shape {output.shape}, must not be {list(order)}")
        if order is not None and order != tuple(range(output.ndim)):
            found[name] = order
    return found


def _derived(module: torch.nn.Module, model: JaxModel, given: NameMap) -> Names:
    for twin, weights in (("torch", dict(module.named_parameters())), ("JAX", model.parameters)):
        for name, weight in weights.items():
            if "complex" in str(weight.dtype):
                raise TypeError(f"{name} of the {twin} model is complex; keep its real and imaginary parts apart")
    paths = {path for path, _ in module.named_modules()}
    return derive_names(torch_leaves(module), paths, shapes_of(model), model.modules(), given, transposed_of(model))


def device_absence(device: str) -> str | None:
    """Return why runs on this kind of device are not possible here, or None if they are."""
    return jax_absence(device) or torch_absence(device)


def products_absence(device: str, dtype: str) -> str | None:
    """Return why products in this precision cannot be had on this kind of device, or None if they can."""
    return jax_products_absence(device, dtype) or torch_products_absence(device, dtype)


def products_of(dtypes: Iterable[str]) -> dict[str, str]:
    """Return how each framework is told to compute the products of each precision that is kept in float32."""
    states = {"torch": torch_products, "jax": jax_products}
    return {
        f"{twin} products in {dtype}": state(dtype)
        for dtype in dtypes
        if PRECISIONS[dtype].storage == np.float32
        for twin, state in states.items()
    }


def device_names(device: str) -> dict[str, str]:
    """Return what the lower precisions ran on, per framework."""
    place = torch_device(device)
    return {
        "torch device": torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu",
        "jax device": jax_device(device).device_kind,
    }
