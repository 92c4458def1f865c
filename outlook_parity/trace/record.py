"""Run one twin and write what it computed to a file; imports its framework and no other."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from outlook_common.arrays import is_floating
from outlook_common.extras import require
from outlook_parity.api import DEVICES, versions
from outlook_parity.compare.tensors import refusal as refusal_of_inputs
from outlook_parity.core.errors import user_code_errors
from outlook_parity.core.precision import PRECISIONS
from outlook_parity.core.recorder import Recorder
from outlook_parity.core.request import Request, inputs_of, places_and_size, round_to
from outlook_parity.core.runner import Runner
from outlook_parity.core.task import no_task, subject_of
from outlook_parity.mapping.infer import TorchLeaf, derive_names
from outlook_parity.mapping.names import Names, names_of_table
from outlook_parity.mapping.unmatched import note_on_names
from outlook_parity.mapping.user import NameMap, name_map_from_options, torch_axes_of
from outlook_parity.models.builtin import Options, make
from outlook_parity.models.user import load_factory, read_inputs
from outlook_parity.trace.file import Header, Leaves, TraceFile, digest, read, write


@dataclass(frozen=True)
class Asked:
    """What the user asked for; see `outlook trace`."""

    framework: Literal["torch", "jax"]
    model: str
    weights: str | None
    prefix: str
    factory: str | None
    inputs: Path | None
    torch_axes: str | None
    names: Path | None
    map_file: Path | None
    dtype: str
    rounded_to: str
    device: str
    seed: int
    gradients: bool
    layers: bool


def write_trace(asked: Asked, out: Path, say: Callable[[str], None]) -> str | None:
    """Run the twin and write the trace; return why nothing could run, None if it did.

    Args:
        asked: what to run.
        out: the file to write.
        say: called before anything runs, with what there is to note.

    Raises:
        ValueError: a dtype, device or model is unknown, or the inputs can tell nothing, or no weight has a name.
        ImportError: the framework is not installed.
        OSError: a file cannot be read or written.
    """
    for what, name, known in (
        ("dtype", asked.dtype, PRECISIONS),
        ("dtype", asked.rounded_to, PRECISIONS),
        ("device", asked.device, DEVICES),
    ):
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}")
    _check_options(asked)
    given = name_map_from_options(asked.map_file, asked.torch_axes)
    require(asked.framework, extra=asked.framework, needed_by="outlook trace")
    model, inputs, config = _subject(asked)
    if reason := refusal_of_inputs(inputs):
        raise ValueError(f"these inputs tell nothing: {reason}")
    absence, products = _SETTINGS[asked.framework]()
    if reason := absence(asked.device, asked.dtype):
        return reason
    twin, leaves, modules, note = _TWINS[asked.framework](asked, given, model, inputs, config)
    if note is not None:
        say(note)
    request = Request(inputs, asked.dtype, asked.device, asked.seed, asked.rounded_to)
    recorder = Recorder()
    with user_code_errors(asked.framework, {name: array.shape for name, array in inputs.items()}):
        ran = twin.run(request, gradients=asked.gradients)
        if asked.layers:
            twin.watch(request, recorder)
    header = Header(
        framework=asked.framework,
        dtype=asked.dtype,
        rounded_to=asked.rounded_to,
        device=asked.device,
        seed=asked.seed,
        inputs={name: digest(_rounded(array, asked)) for name, array in inputs.items()},
        weights={name: digest(_rounded(array, asked)) for name, array in twin.weights().items()},
        summed=places_and_size(inputs),
        environment={**versions(), "device": asked.device, "products": products(asked.dtype)},
        leaves=leaves,
        modules=modules,
        output_dtypes=dict(ran.dtypes),
    )
    write(out, TraceFile(header, dict(ran.outputs), dict(ran.gradients), recorder.events))
    return None


def _rounded(array: np.ndarray, asked: Asked) -> np.ndarray:
    return round_to(array, asked.rounded_to) if is_floating(array) else array


def _check_options(asked: Asked) -> None:
    """Raise a ValueError if options are given that say nothing without one that is not."""
    if asked.factory is not None:
        if asked.inputs is None:
            raise ValueError("--factory takes --inputs too")
        return
    theirs = {
        "--inputs": asked.inputs,
        "--torch-axes": asked.torch_axes,
        "--names": asked.names,
        "--map": asked.map_file,
    }
    for option, value in theirs.items():
        if value is not None:
            raise ValueError(f"{option} is about a model of your own: --factory is not given")


def _subject(asked: Asked) -> tuple[Any, dict[str, np.ndarray], Any]:
    """Return the model, its inputs and its configuration, None for the user's own."""
    if asked.factory is not None:
        assert asked.inputs is not None
        return load_factory(asked.factory, "--factory"), inputs_of(read_inputs(asked.inputs)), None
    options = Options(
        asked.model, asked.weights, asked.prefix, asked.seed, num_heads=None, kernel_size=3, stride=2, padding=None
    )
    made = make(options, (asked.framework,))
    model = made.torch_model if asked.framework == "torch" else made.jax_model
    return model, inputs_of(made.inputs), getattr(model, "config", model)


class Made(NamedTuple):
    """A twin, and what there is to say about it; see `Header`."""

    twin: Runner
    leaves: Leaves
    modules: list[str]
    note: str | None


def _torch(asked: Asked, given: NameMap, model: Any, inputs: dict[str, np.ndarray], config: Any) -> Made:
    from outlook_parity.backends.torch.model import compared_weights, torch_leaves, torch_module
    from outlook_parity.backends.torch.runner import TorchRunner

    module = torch_module(model)
    subject = None if config is None else subject_of(config)
    axes = torch_axes_of(given, inputs, subject.torch_axes if subject else None)
    twin = TorchRunner(module, axes, no_task, given.out_axes, None if subject else compared_weights(module))
    leaves = {name: (leaf.kind, leaf.shape) for name, leaf in torch_leaves(module).items()}
    return Made(twin, leaves, [path for path, _ in module.named_modules()], None)


def _jax(asked: Asked, given: NameMap, model: Any, inputs: dict[str, np.ndarray], config: Any) -> Made:
    from outlook_parity.backends.jax.model import jax_model, shapes_of, transposed_of
    from outlook_parity.backends.jax.runner import JaxRunner

    twin, note = jax_model(model), None
    if config is not None:
        names = names_of_table(config)
    elif asked.names is None:
        names = Names([], {})
        if twin.parameters:
            raise ValueError("--names: the trace of the torch twin is needed, whose names the weights are to have")
    else:
        header = read(asked.names).header
        if header.framework != "torch":
            raise ValueError(f"--names must be the trace of the torch twin; {asked.names} is {header.framework}'s")
        leaves = {name: TorchLeaf(*leaf) for name, leaf in header.leaves.items()}
        shapes = shapes_of(twin)
        names = derive_names(leaves, header.modules, shapes, twin.modules(), given, transposed_of(twin))
        note = note_on_names(names, leaves, shapes, str(asked.names))
    return Made(JaxRunner(twin, names, no_task), {}, [], note)


# Of a device and a precision why there is none, None if there is; and how products are computed in a precision.
Settings = tuple[Callable[[str, str], str | None], Callable[[str], str]]


def _torch_settings() -> Settings:
    from outlook_parity.backends.torch.settings import torch_absence, torch_products, torch_products_absence

    return lambda device, dtype: torch_absence(device) or torch_products_absence(device, dtype), torch_products


def _jax_settings() -> Settings:
    from outlook_parity.backends.jax.settings import jax_absence, jax_products, jax_products_absence

    return lambda device, dtype: jax_absence(device) or jax_products_absence(device, dtype), jax_products


_TWINS: dict[str, Callable[..., Made]] = {"torch": _torch, "jax": _jax}
_SETTINGS: dict[str, Callable[[], Settings]] = {"torch": _torch_settings, "jax": _jax_settings}
