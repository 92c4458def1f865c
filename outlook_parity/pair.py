"""Two models as a pair of twins: a runner for each, the names that correspond, and the levels that can be compared."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen, nnx

from outlook_common.arrays import is_floating
from outlook_common.text import listed
from outlook_parity.backends.exported.runner import ExportedRunner
from outlook_parity.backends.jax.base import JaxModel
from outlook_parity.backends.jax.functions import FunctionModel
from outlook_parity.backends.jax.model import as_jax_model, output_shapes
from outlook_parity.backends.jax.placement import Placement, placement_of
from outlook_parity.backends.jax.runner import JaxRunner
from outlook_parity.backends.jax.runner import to_float64 as jax_to_float64
from outlook_parity.backends.names import names_of_models
from outlook_parity.backends.order import call_order
from outlook_parity.backends.torch.model import (
    FunctionModule,
    argument_names_of,
    as_torch_module,
    compared_weights,
    to_float64,
)
from outlook_parity.backends.torch.runner import TorchRunner
from outlook_parity.core.calls import accept_keywords
from outlook_parity.core.check import NOT_COMPARED, TWINS, Tensors
from outlook_parity.core.errors import user_code_errors
from outlook_parity.core.layout import Axes, fitting_axes
from outlook_parity.core.masks import OutputMasks, output_masks
from outlook_parity.core.memory import Sizes
from outlook_parity.core.outputs import Beside, Output, match_outputs
from outlook_parity.core.request import Inputs, Request
from outlook_parity.core.sharding import Sharding, ShardingRequest
from outlook_parity.core.task import MASK, Task, mean_square, no_task
from outlook_parity.mapping.names import Names
from outlook_parity.mapping.output_axes import Shapes, output_axes
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
        keywords: of the inputs, in their order, where the models are called by keyword.
        masks: which positions of the outputs count.
        notes: what else to know of the pair.
        constants: twin -> arrays that are no weights, under one name in both.
        sharding: over which devices JAX's runs, None for one.
        truth: the twin that computes the float64 truth.
        precision: the only one that can be compared, None for all.
    """

    torch: TorchRunner | ExportedRunner
    jax: JaxRunner | ExportedRunner
    names: Names
    refused: dict[str, str]
    keywords: tuple[str, ...] = ()
    masks: OutputMasks = field(default_factory=OutputMasks)
    notes: tuple[str, ...] = ()
    constants: Mapping[str, Tensors] = field(default_factory=lambda: {twin: {} for twin in TWINS})
    sharding: Sharding | None = None
    truth: str = "torch"
    precision: str | None = None

    def sizes(self, inputs: Inputs) -> Sizes:
        """Return how many numbers the twins hold, and a forward pass of these inputs."""
        assert isinstance(self.torch, TorchRunner)
        assert isinstance(self.jax, JaxRunner)  # a bound of memory is for two models
        counts = [
            [x.numel() for x in self.torch.model.parameters()],
            [x.size for x in self.jax.model.parameters.values()],
        ]
        work = self.jax.work(Request(inputs, "float32", "cpu", 0, "float32", keywords=self.keywords))
        largest = max((size for sizes in counts for size in sizes), default=0)
        return Sizes(max(map(sum, counts)), largest, work.live, work.numbers)


def make_pair(
    torch_model: Any,
    jax_model: Any,
    inputs: Inputs,
    name_map: NameMap,
    keywords: tuple[str, ...] = (),
    output_mask: Any = None,
    sharding: ShardingRequest | None = None,
) -> Pair:
    """Return two models as a pair of twins.

    Args:
        torch_model: a module or a function.
        jax_model: its twin, see `as_jax_model`.
        inputs: by name, as JAX takes them.
        name_map: the user's map.
        keywords: of the inputs, in their order: by which they are passed if both models have arguments of these names.
        output_mask: see `output_masks`.
        sharding: over how many devices JAX's is to run; None runs it as it is given.

    Raises:
        TypeError: a model is no module, no function, and no pair of a Linen module and its variables.
        ValueError: `torch_axes` has another number of axes than the inputs; or JAX's cannot run sharded so.
    """
    module, model = normalise_models(torch_model, jax_model)
    placement = placement_of(model, sharding or ShardingRequest())
    known = _known_pair(module, model, inputs, name_map)
    if known is None:
        return _user_pair(module, model, inputs, name_map, keywords, output_mask, placement)
    if output_mask is not None:
        raise ValueError("output_mask is for models of your own: every position of a VOLO counts")
    return _own_pair(module, model, inputs, name_map, known, placement)


def normalise_models(torch_model: Any, jax_model: Any) -> tuple[torch.nn.Module, JaxModel]:
    """Return both twins as `as_torch_module` and `as_jax_model` do; a TypeError if they are exchanged."""
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


def _own_pair(
    module: torch.nn.Module,
    model: JaxModel,
    inputs: Inputs,
    name_map: NameMap,
    known: KnownModel,
    placement: Placement,
) -> Pair:
    names = known.names()
    shape = next(iter(inputs.values())).shape
    task = _per_seed(lambda rng: known.task(shape, rng))
    axes = torch_axes_of(name_map, inputs, known.torch_axes)
    return Pair(
        TorchRunner(module, axes, task),
        JaxRunner(model, names, task, placement=placement),
        names,
        _refused(module, model),
        sharding=placement.describe(model, inputs),
    )


def _user_pair(
    module: torch.nn.Module,
    model: JaxModel,
    inputs: Inputs,
    name_map: NameMap,
    given: tuple[str, ...],
    output_mask: Any,
    placement: Placement,
) -> Pair:
    keywords = shared_keywords(module, model, given)
    alone = _alone_with_weights(module, model)
    axes = torch_axes_of(name_map, inputs, None)
    order = partial(call_order_of, module, model, inputs, axes, keywords)
    names = Names([], {}) if alone else names_of_models(module, model, name_map, order, same_weights=True)
    torch_outputs, jax_outputs, beside = _outputs(module, model, inputs, axes, keywords)
    matched = match_outputs(torch_outputs, jax_outputs, lambda one, other: bool(fitting_axes(one, other)))
    opaque = [f"{NOT_COMPARED}, as it holds no arrays: {listed(beside.opaque)}"] if beside.opaque else []

    def shapes(torch_outputs: Mapping[str, Output], jax_outputs: Mapping[str, Output]) -> tuple[Shapes, Shapes]:
        ours = {name: output.shape for name, output in torch_outputs.items()}
        return ours, {name: output.shape for name, output in matched.of_jax(jax_outputs).items()}

    def shapes_of(inputs: Mapping[str, np.ndarray]) -> tuple[Shapes, Shapes]:
        return shapes(*_outputs(module, model, inputs, axes, keywords)[:2])

    torch_shapes, jax_shapes = shapes(torch_outputs, jax_outputs)
    found = output_axes(torch_shapes, jax_shapes, name_map.out_axes, axes, inputs, shapes_of)
    common = {name: output for name, output in matched.of_jax(jax_outputs).items() if name in torch_outputs}
    masks = output_masks(output_mask, inputs, jax_shapes)
    floating = {name: output.shape for name, output in common.items() if output.floating}
    task = _per_seed(lambda rng: _mean_square(floating, masks.by_output, rng))
    compared = [name for name in compared_weights(module) if name in set(names.expected)]
    constants, uncompared = _constants(module, model, names)
    return Pair(
        TorchRunner(module, axes, task, found.orders, compared, matched),
        JaxRunner(model, names, task, matched, weightless=bool(alone), placement=placement),
        names,
        _refused(module, model),
        keywords,
        masks,
        (*alone, *matched.notes, *found.notes, *opaque, *uncompared, *masks.notes),
        constants,
        placement.describe(model, inputs),
    )


def _constants(
    module: torch.nn.Module, model: JaxModel, names: Names
) -> tuple[dict[str, dict[str, np.ndarray]], list[str]]:
    """Return JAX's constants and PyTorch's buffers of the same names, and as a note which have none."""
    found: dict[str, dict[str, np.ndarray]] = {twin: {} for twin in TWINS}
    buffers, left = dict(module.named_buffers()), []
    for flax in model.constants:
        array = model.buffers[flax]
        owner, _, leaf = flax.rpartition(".")
        name = ".".join(filter(None, (names.module(owner), leaf)))
        if name in buffers and not jnp.issubdtype(array.dtype, jax.dtypes.extended):  # a random key is no number
            found["torch"][name], found["jax"][name] = to_float64(buffers[name]), jax_to_float64(array)
        else:
            left.append(f"{flax} {tuple(array.shape)}")
    return found, [f"constants of the JAX model without a buffer of that name in torch: {listed(left)}"] if left else []


def _alone_with_weights(module: torch.nn.Module, model: JaxModel) -> list[str]:
    """Return as a note that one twin is a function without weights, and the other has some; none if neither or both."""
    torch_count, jax_count = len(list(module.parameters())), len(model.parameters)
    if isinstance(module, FunctionModule) and jax_count:
        twin, other, count = "torch", "JAX", jax_count
    elif isinstance(model, FunctionModel) and model.weights is None and torch_count:
        twin, other, count = "JAX", "torch", torch_count
    else:
        return []
    return [
        f"the {twin} model is a function without weights: the {count} parameters of {other} and their gradients were "
        "not compared"
    ]


def shared_keywords(module: torch.nn.Module, model: JaxModel, given: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the inputs if both models take all of them by keyword, else none."""
    return given if accept_keywords(given, argument_names_of(module), model.argument_names) else ()


def call_order_of(
    module: torch.nn.Module, model: JaxModel, inputs: Inputs, axes: Mapping[str, Axes], keywords: tuple[str, ...]
) -> tuple[Order, Order]:
    """Return when each module is first called."""
    request = Request(inputs, "float32", "cpu", 0, "float32", keywords=keywords)
    return call_order(TorchRunner(module, axes, no_task), JaxRunner(model, Names([], {}), no_task), request)


def _refused(module: torch.nn.Module, model: JaxModel) -> dict[str, str]:
    if isinstance(module, FunctionModule) or (isinstance(model, FunctionModel) and model.weights is None):
        return dict.fromkeys(("layers", "training"), "a plain function has no modules and no weights")
    if not model.has_modules:
        return {"layers": "a function of weights and inputs has no modules"}
    return {}


def _per_seed(make: Callable[[np.random.Generator], Task]) -> Callable[[Request], Task]:
    """Return a function from requests to tasks, which are made once per seed."""

    @cache
    def task(seed: int) -> Task:
        return make(np.random.default_rng(seed))

    return lambda request: task(request.seed)


def _mean_square(
    shapes: Mapping[str, tuple[int, ...]], masks: Mapping[str, np.ndarray], rng: np.random.Generator
) -> Task:
    """Return the mean square of all floating-point outputs from random targets, where they count."""
    targets = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    return mean_square(targets | {f"{name}{MASK}": masks[name].astype(float) for name in shapes if name in masks})


def _outputs(
    module: torch.nn.Module, model: JaxModel, inputs: Inputs, axes: Mapping[str, Axes], keywords: tuple[str, ...]
) -> tuple[dict[str, Output], dict[str, Output], Beside]:
    """Return the outputs of both models, each in its own layout, and what either holds besides arrays."""
    request = Request(inputs, "float32", "cpu", 0, "float32", keywords=keywords)
    runner = TorchRunner(module, axes, no_task)
    run = runner.run(request, gradients=False)
    torch_outputs = {name: Output(array.shape, "float" in run.dtypes[name]) for name, array in run.outputs.items()}
    with user_code_errors("JAX", {name: array.shape for name, array in inputs.items()}):
        shapes = output_shapes(model, inputs, keywords, of_jax := Beside())
    if not torch_outputs and not shapes:
        raise TypeError("both models return nothing that could be compared")
    jax_outputs = {n: Output(tuple(o.shape), bool(jnp.issubdtype(o.dtype, jnp.floating))) for n, o in shapes.items()}
    of_torch = runner.beside
    opaque = [*(f"{name} of torch" for name in of_torch.opaque), *(f"{name} of JAX" for name in of_jax.opaque)]
    return torch_outputs, jax_outputs, Beside(opaque)
