"""Two models as a pair of twins: what corresponds to what in them, and what can be compared."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import numpy as np
import torch

from outlook_common.weights.arrays import to_numpy
from outlook_parity.jax_models import FunctionModel, JaxModel, jax_model
from outlook_parity.jax_twin import JaxTwin, jax_device
from outlook_parity.names import Given, Names, derive_names, names_of_table
from outlook_parity.request import Request
from outlook_parity.subjects import Subject, Task, mean_square, subject_of
from outlook_parity.tape import channels_last
from outlook_parity.torch_twin import FunctionModule, TorchTwin, compared_weights, torch_device

LEVELS_OF_FUNCTIONS = ("forward", "gradients")


@dataclass(frozen=True)
class Pair:
    """Two twins, PyTorch's first.

    Attributes:
        torch: PyTorch's.
        jax: JAX's.
        names: what corresponds.
        refused: level -> why it cannot be had of this pair.
    """

    torch: TorchTwin
    jax: JaxTwin
    names: Names
    refused: dict[str, str]


def make_pair(torch_model: Any, jax_twin_model: Any, inputs: np.ndarray, given: Given) -> Pair:
    """Return two models as twins.

    Raises:
        TypeError: a model is no module, no function, and no pair of a Linen module and its variables.
        ValueError: `torch_axes` has another number of axes than the inputs.
    """
    function = not isinstance(torch_model, torch.nn.Module)
    if function and not callable(torch_model):
        raise TypeError(f"the torch model must be a torch.nn.Module or a function, got {type(torch_model).__name__}")
    module = FunctionModule(torch_model) if function else torch_model
    model = jax_model(jax_twin_model)
    config = getattr(module, "config", module)
    ours = hasattr(getattr(model, "module", None), "config") and not (given.weights or given.modules)
    subject = subject_of(config) if ours else None
    names = _derived(module, model, given) if subject is None else names_of_table(config)
    axes = _axes(given, subject, inputs.ndim)
    out_axes = None if subject else _out_axes(module, model, inputs, axes)
    task = _task(subject, config, inputs, lambda: _out_shape(model, inputs))
    refused = {}
    if function or isinstance(model, FunctionModel):
        refused = dict.fromkeys(("layers", "training"), "a plain function has no modules and no weights")
    compared = None if subject else compared_weights(module)
    return Pair(TorchTwin(module, axes, task, out_axes, compared), JaxTwin(model, names, task), names, refused)


def load_torch_weights(jax_twin_model: Any, torch_model: torch.nn.Module, names: Given | None = None) -> Any:
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
    derived = _derived(torch_model, model, names or Given())
    state, wrong = torch_model.state_dict(), []
    loaded: dict[str, np.ndarray] = {}
    for flax, value in {**model.parameters, **{name: model.buffers[name] for name in model.statistics}}.items():
        weight = derived.by_flax[flax]
        if weight.torch not in state:
            wrong.append(f"{flax} has no counterpart in torch")
            continue
        array = weight.to_flax(to_numpy(state[weight.torch]))
        if array.shape != value.shape:
            wrong.append(f"{flax} has shape {value.shape}, {weight.torch} in its layout {array.shape}")
        loaded[flax] = array.astype(value.dtype)
    taken = {derived.by_flax[flax].torch for flax in loaded}
    wrong += [f"{name} of torch has no counterpart in JAX" for name in derived.expected if name not in taken]
    if wrong:
        raise ValueError("weights that do not correspond: " + "; ".join(dict.fromkeys(wrong)))
    return model.with_weights(loaded)


def _axes(given: Given, subject: Subject | None, ndim: int) -> tuple[int, ...]:
    axes = given.torch_axes or (subject.torch_axes if subject else tuple(range(ndim)))
    if given.torch_axes and len(axes) != ndim:
        raise ValueError(f"torch_axes={list(axes)} has {len(axes)} axes, the inputs have {ndim}")
    return axes


def _task(
    subject: Subject | None, config: Any, inputs: np.ndarray, out_shape: Callable[[], tuple[int, ...]]
) -> Callable[[Request], Task]:
    @cache
    def task(seed: int) -> Task:
        rng = np.random.default_rng(seed)
        return (
            mean_square(rng.standard_normal(out_shape()))
            if subject is None
            else subject.task(config, inputs.shape, rng)
        )

    return lambda request: task(request.seed)


def _out_shape(model: JaxModel, inputs: np.ndarray) -> tuple[int, ...]:
    prepared = model.prepared(np.dtype(np.float32), training=False, one_by_one=False)
    x = jax.ShapeDtypeStruct(inputs.shape, np.float32)  # type: ignore[no-untyped-call]
    output = jax.eval_shape(lambda p, b, x: prepared.call(p, b, x)[0], prepared.parameters, prepared.buffers, x)
    return tuple(getattr(output, "shape", ()))


def _out_axes(
    module: torch.nn.Module, model: JaxModel, inputs: np.ndarray, axes: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Return channels last if the shapes of the outputs fit so and not as they are."""
    twin = TorchTwin(module, axes, lambda request: Task(np.zeros(0), lambda *_: None))
    shape = twin.run(Request(inputs, "float32", "cpu", 0, "float32"), gradients=False).output.shape
    wanted = _out_shape(model, inputs)
    last = channels_last(len(shape)) if len(shape) > 2 else ()
    return last if last and shape != wanted and tuple(shape[axis] for axis in last) == wanted else None


def _derived(module: torch.nn.Module, model: JaxModel, given: Given) -> Names:
    kinds = {path: type(part).__name__ for path, part in module.named_modules()}
    named = compared_weights(module)
    flax = [*model.parameters, *model.statistics]
    torch_weights = {name: kinds[name.rpartition(".")[0]] for name in named}
    flax_modules = {".".join(path[:n]) for path in (name.split(".") for name in flax) for n in range(len(path))}
    return derive_names(torch_weights, set(kinds), flax, flax_modules | set(model.modules()), given)


def device_absence(device: str) -> str | None:
    """Return why runs on this kind of device are not possible here, or None if they are."""
    try:
        jax_device(device)
    except RuntimeError as error:
        return f"JAX has no {device} here ({str(error).splitlines()[0]})"
    if device == "gpu" and not torch.cuda.is_available():
        return "PyTorch has no CUDA device here"
    return None


def device_names(device: str) -> dict[str, str]:
    """Return what the lower precisions ran on, per framework."""
    place = torch_device(device)
    return {
        "torch device": torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu",
        "jax device": jax_device(device).device_kind,
    }
