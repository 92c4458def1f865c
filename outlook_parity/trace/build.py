"""Load the model of a trace and make the runner of its framework; the other framework is not imported."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from outlook_parity.core.calls import accept_keywords
from outlook_parity.core.request import inputs_of, keywords_of
from outlook_parity.core.runner import Runner
from outlook_parity.core.task import no_task
from outlook_parity.mapping.infer import TorchLeaf, derive_names
from outlook_parity.mapping.names import Names
from outlook_parity.mapping.unmatched import note_on_names
from outlook_parity.mapping.user import NameMap, torch_axes_of
from outlook_parity.models.builtin import Options, make
from outlook_parity.models.registry import KnownModel, known_model
from outlook_parity.models.user import load_factory, read_inputs
from outlook_parity.trace.file import Leaves, read


@dataclass(frozen=True)
class UserModel:
    """Where a user's model comes from.

    Attributes:
        factory: "package.module:factory".
        inputs: a file of arrays, as JAX takes them.
        name_map: names and axes where Flax's conventions do not give them.
        torch_trace: of a JAX model: the trace of its PyTorch twin, None if it has no weights.
    """

    factory: str
    inputs: Path
    name_map: NameMap
    torch_trace: Path | None


Source = Options | UserModel


class LoadedModel(NamedTuple):
    """A model, its inputs by name and in their file, and how it is verified if it is one of this package."""

    model: Any
    inputs: dict[str, np.ndarray]
    known: KnownModel | None
    keywords: tuple[str, ...] = ()


class TracedTwin(NamedTuple):
    """A runner, what `Header` keeps of its model, weights without counterpart as a note, and the request's keywords."""

    runner: Runner
    leaves: Leaves
    modules: list[str]
    note: str | None
    keywords: tuple[str, ...] = ()


def load(framework: str, source: Source) -> LoadedModel:
    """Return the model of one framework and its inputs.

    Raises:
        ValueError: the model is unknown, a factory fails, or weights or inputs are damaged.
        OSError: a file cannot be read.
    """
    if isinstance(source, UserModel):
        inputs = read_inputs(source.inputs)
        return LoadedModel(load_factory(source.factory, f"--{framework}"), inputs_of(inputs), None, keywords_of(inputs))
    twins = make(source, (framework,), needed_by="outlook trace")
    model = twins.torch_model if framework == "torch" else twins.jax_model
    return LoadedModel(model, inputs_of(twins.inputs), known_model(model))


def build(framework: str, source: Source, loaded: LoadedModel) -> TracedTwin:
    """Return the runner of a loaded model.

    Raises:
        ValueError: `torch_trace` is missing or of another framework, no weight has a counterpart in it, or the axes of
            the name map do not fit.
        OSError: `torch_trace` cannot be read.
    """
    return _BUILDERS[framework](source, loaded)


def _torch(source: Source, loaded: LoadedModel) -> TracedTwin:
    from outlook_parity.backends.torch.model import (
        argument_names_of,
        as_torch_module,
        compared_weights,
        torch_leaves,
    )
    from outlook_parity.backends.torch.runner import TorchRunner

    name_map = source.name_map if isinstance(source, UserModel) else NameMap()
    module = as_torch_module(loaded.model)
    axes = torch_axes_of(name_map, loaded.inputs, loaded.known.torch_axes if loaded.known else None)
    runner = TorchRunner(module, axes, no_task, name_map.out_axes, None if loaded.known else compared_weights(module))
    leaves = {name: (leaf.kind, leaf.shape) for name, leaf in torch_leaves(module).items()}
    keywords = loaded.keywords if accept_keywords(loaded.keywords, argument_names_of(module)) else ()
    return TracedTwin(runner, leaves, [path for path, _ in module.named_modules()], None, keywords)


def _jax(source: Source, loaded: LoadedModel) -> TracedTwin:
    from outlook_parity.backends.jax.model import as_jax_model
    from outlook_parity.backends.jax.runner import JaxRunner

    model = as_jax_model(loaded.model)
    if loaded.known is not None:
        names, note = loaded.known.names(), None
    else:
        assert isinstance(source, UserModel)
        names, note = _jax_names(source, model)
    keywords = loaded.keywords if accept_keywords(loaded.keywords, model.argument_names) else ()
    return TracedTwin(JaxRunner(model, names, no_task), {}, [], note, keywords)


def _jax_names(source: UserModel, model: Any) -> tuple[Names, str | None]:
    """Return the names of a JAX model's weights by the trace of its PyTorch twin, and which have no counterpart."""
    from outlook_parity.backends.jax.model import shapes_of, transposed_of

    if source.torch_trace is None:
        if model.parameters:
            raise ValueError("a JAX model needs --names: the torch trace, for the names of the weights")
        return Names([], {}), None
    header = read(source.torch_trace).header
    if header.framework != "torch":
        raise ValueError(f"--names must be the trace of the torch twin; {source.torch_trace} is {header.framework}'s")
    leaves = {name: TorchLeaf(*leaf) for name, leaf in header.leaves.items()}
    shapes = shapes_of(model)
    names = derive_names(leaves, header.modules, shapes, model.modules(), source.name_map, transposed_of(model))
    return names, note_on_names(names, leaves, shapes, str(source.torch_trace))


_BUILDERS: dict[str, Callable[[Source, LoadedModel], TracedTwin]] = {"torch": _torch, "jax": _jax}
