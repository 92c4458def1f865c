"""Run one twin and write what it computed to a file; imports its framework and no other."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from outlook_common.extras import require
from outlook_parity.compare import DTYPES
from outlook_parity.compare import refusal as refusal_of_inputs
from outlook_parity.models import Options, make
from outlook_parity.names import Given, Names, derive_names, names_of_table, read_given
from outlook_parity.request import Request, round_to
from outlook_parity.subjects import Task, subject_of
from outlook_parity.tape import Tape
from outlook_parity.theirs import build, read_inputs
from outlook_parity.tracefile import Header, TraceFile, digest, read, write
from outlook_parity.twin import Twin
from outlook_parity.verification import DEVICES, versions


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


def write_trace(asked: Asked, out: Path) -> str | None:
    """Run the twin and write the trace; return why nothing could run, None if it did.

    Raises:
        ValueError: a dtype, device or model is unknown, or the inputs can tell nothing.
        ImportError: the framework is not installed.
        OSError: a file cannot be read or written.
    """
    for what, given, known in (
        ("dtype", asked.dtype, DTYPES),
        ("dtype", asked.rounded_to, DTYPES),
        ("device", asked.device, DEVICES),
    ):
        if given not in known:
            raise ValueError(f"unknown {what} {given!r}; known: {', '.join(known)}")
    require(asked.framework, extra=asked.framework, needed_by="outlook trace")
    model, inputs, config = _subject(asked)
    if reason := refusal_of_inputs(inputs):
        raise ValueError(f"these inputs tell nothing: {reason}")
    if reason := _ABSENCE[asked.framework](asked.device):
        return reason
    twin, kinds, modules = _TWINS[asked.framework](asked, model, inputs, config)
    request = Request(inputs, asked.dtype, asked.device, asked.seed, asked.rounded_to)
    ran, tape = twin.run(request, gradients=asked.gradients), Tape()
    if asked.layers:
        twin.watch(request, tape)
    header = Header(
        framework=asked.framework,
        dtype=asked.dtype,
        rounded_to=asked.rounded_to,
        device=asked.device,
        seed=asked.seed,
        inputs=digest(round_to(inputs, asked.rounded_to)),
        weights={name: digest(round_to(array, asked.rounded_to)) for name, array in twin.weights().items()},
        environment={**versions(), "device": asked.device, "float32 products": "full precision (TF32 off)"},
        kinds=kinds,
        modules=modules,
        output_dtype=ran.output_dtype,
    )
    write(out, TraceFile(header, ran.output, dict(ran.gradients), tape.events))
    return None


def _subject(asked: Asked) -> tuple[Any, np.ndarray, Any]:
    """Return the model, its inputs and its configuration, None for the user's own."""
    if asked.factory is not None:
        if asked.inputs is None:
            raise ValueError("--factory takes --inputs too")
        return build(asked.factory, "--factory"), read_inputs(asked.inputs).astype(np.float64), None
    options = Options(asked.model, asked.weights, asked.prefix, asked.seed, None, 3, 2, None)
    made = make(options, (asked.framework,))
    model = made.torch_model if asked.framework == "torch" else made.jax_model
    return model, made.inputs, getattr(model, "config", model)


def _torch(asked: Asked, model: Any, inputs: np.ndarray, config: Any) -> tuple[Twin, dict[str, str], list[str]]:
    import torch

    from outlook_parity.torch_twin import FunctionModule, TorchTwin, compared_weights

    module = model if isinstance(model, torch.nn.Module) else FunctionModule(model)
    subject = None if config is None else subject_of(config)
    axes = subject.torch_axes if subject else _axes(asked, inputs.ndim)
    names = compared_weights(module)
    kinds = {path: type(part).__name__ for path, part in module.named_modules()}
    twin = TorchTwin(module, axes, _no_task, None, None if subject else names)
    return twin, {name: kinds[name.rpartition(".")[0]] for name in names}, list(kinds)


def _axes(asked: Asked, ndim: int) -> tuple[int, ...]:
    given = _given(asked).torch_axes
    if asked.torch_axes is not None:
        given = tuple(int(axis) for axis in asked.torch_axes.split(","))
    axes = tuple(range(ndim)) if given is None else given
    if sorted(axes) != list(range(ndim)):
        raise ValueError(f"--torch-axes must be a permutation of 0 to {ndim - 1}, got {asked.torch_axes}")
    return axes


def _given(asked: Asked) -> Given:
    return Given() if asked.map_file is None else read_given(asked.map_file)


def _jax(asked: Asked, model: Any, inputs: np.ndarray, config: Any) -> tuple[Twin, dict[str, str], list[str]]:
    from outlook_parity.jax_models import jax_model
    from outlook_parity.jax_twin import JaxTwin

    twin = jax_model(model)
    if config is not None:
        names = names_of_table(config)
    elif asked.names is None:
        names = Names([], {})
        if twin.parameters:
            raise ValueError("--names: the trace of the torch twin is needed, whose names the weights are to have")
    else:
        header = read(asked.names).header
        flax = [*twin.parameters, *twin.statistics]
        modules = {".".join(path[:n]) for path in (name.split(".") for name in flax) for n in range(len(path))}
        names = derive_names(header.kinds, header.modules, flax, modules | set(twin.modules()), _given(asked))
    return JaxTwin(twin, names, _no_task), {}, []


def _no_task(request: Request) -> Task:
    raise AssertionError("a trace does not train")


def _torch_absence(device: str) -> str | None:
    import torch

    return "PyTorch has no CUDA device here" if device == "gpu" and not torch.cuda.is_available() else None


def _jax_absence(device: str) -> str | None:
    from outlook_parity.jax_twin import jax_device

    try:
        jax_device(device)
    except RuntimeError as error:
        return f"JAX has no {device} here ({str(error).splitlines()[0]})"
    return None


_TWINS: dict[str, Callable[..., tuple[Twin, dict[str, str], list[str]]]] = {"torch": _torch, "jax": _jax}
_ABSENCE = {"torch": _torch_absence, "jax": _jax_absence}
