"""`outlook trace`: run one twin and write what it computes to a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outlook_parity.cli.exit_codes import NOT_RUN
from outlook_parity.cli.help import epilog
from outlook_parity.cli.options import (
    OWN_MODELS,
    InputOptions,
    LayerOptions,
    ModelOptions,
    ProgressOptions,
    Seed,
    grouped,
    name_map_from_options,
    refuse_without,
)
from outlook_parity.cli.output import print_line
from outlook_parity.cli.progress import steps
from outlook_parity.core.plan import TRACED_LEVELS
from outlook_parity.core.precision import IN_WORDS

if TYPE_CHECKING:
    from outlook_parity.trace.build import Source

EPILOG = epilog(
    "outlook trace --framework torch --model layer --out a.trace",
    "outlook trace --torch my_torch:model --inputs x.npy --out a.trace",
    "outlook trace --jax my_jax:model --inputs x.npy --names a.trace --out b.trace",
)


@dataclass(frozen=True)
class FileOptions:
    """The file to write, and which of this package's twins runs."""

    out: Annotated[Path, typer.Option(help="The file to write.", show_default=False)]
    framework: Annotated[
        str | None, typer.Option(help="Which twin runs here: torch or jax.", show_default="that of your own model")
    ] = None


@dataclass(frozen=True)
class OwnModelOptions:
    """The user's own model."""

    torch_factory: Annotated[
        str | None,
        typer.Option("--torch", help="PyTorch model: package.module:factory.", rich_help_panel=OWN_MODELS),
    ] = None
    jax_factory: Annotated[
        str | None,
        typer.Option("--jax", help="JAX model: likewise, as in `outlook verify`.", rich_help_panel=OWN_MODELS),
    ] = None
    names: Annotated[
        Path | None,
        typer.Option(help="For a JAX model: the torch trace, for names of weights.", rich_help_panel=OWN_MODELS),
    ] = None


@dataclass(frozen=True)
class RunOptions:
    """What is computed, in which precision and where."""

    dtype: Annotated[str, typer.Option(help=f"{IN_WORDS}.", metavar="DTYPE")] = "float64"
    rounded_to: Annotated[
        str | None,
        typer.Option(
            help="Round inputs and weights to this precision first: for a truth.",
            show_default="the dtype",
            metavar="DTYPE",
        ),
    ] = None
    device: Annotated[str, typer.Option(help="cpu, gpu or tpu.", metavar="DEVICE")] = "cpu"
    seed: Seed = 0
    level: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(TRACED_LEVELS[:-1])} or {TRACED_LEVELS[-1]}; repeatable.",
            show_default="all",
            metavar="LEVEL",
        ),
    ] = None


@grouped
def trace(
    file: FileOptions,
    model: ModelOptions,
    run: RunOptions,
    own: OwnModelOptions,
    inputs: InputOptions,
    layer: LayerOptions,
    progress: ProgressOptions,
) -> None:
    """Run one twin and write what it computes to a file.

    Only the framework of this twin is needed. `outlook compare` compares
    the files of both twins, on any machine.

    Your own JAX model takes the names of its weights from --names:
    weights without counterpart there are listed on stderr before it runs;
    if no weight has one, that is an error.

    Exit codes: 0 written, 2 error, 3 not run (no such device here, or
    none with TF32).
    """
    from outlook_parity.trace.record import TraceRequest, record

    framework, factory = _twin(file.framework, own)
    levels = run.level or TRACED_LEVELS
    if unknown := [level for level in levels if level not in TRACED_LEVELS]:
        raise ValueError(f"unknown level {unknown[0]!r}; known: {', '.join(TRACED_LEVELS)}")
    request = TraceRequest(
        framework=framework,
        dtype=run.dtype,
        rounded_to=run.rounded_to or run.dtype,
        device=run.device,
        seed=run.seed,
        gradients="gradients" in levels,
        modules="layers" in levels,
    )
    if factory is None:
        _refuse_own(own, inputs)
    source = model.builtin(run.seed, layer) if factory is None else _user_model(factory, own, inputs)
    with steps("loading the framework", quiet=progress.quiet) as step:
        reason = record(request, source, file.out, lambda note: _warn(f"note: {note}"), step)
    if reason is not None:
        _warn(f"NOT RUN: {reason}")
        raise typer.Exit(NOT_RUN)
    print_line(f"trace: {file.out}")


def _warn(text: str) -> None:
    print_line(text, style="yellow", stderr=True)


def _twin(framework: str | None, own: OwnModelOptions) -> tuple[str, str | None]:
    """Return the framework to run, and the factory of the user's own model, None for this package's.

    Raises:
        ValueError: no twin is named, or two are.
    """
    factories = {"torch": own.torch_factory, "jax": own.jax_factory}
    given = {name: factory for name, factory in factories.items() if factory is not None}
    if not given and framework is None:
        raise ValueError("which twin? --torch or --jax names your own model, --framework torch or jax this package's")
    if len(given) > 1 or (given and framework not in (None, *given)):
        raise ValueError(
            "a trace is of one twin: give --torch or --jax, and --framework for this package's models only"
        )
    return next(iter(given.items())) if given else (str(framework), None)


def _refuse_own(own: OwnModelOptions, inputs: InputOptions) -> None:
    """Raise a ValueError if an option for the user's own models is given without one."""
    refuse_without(
        ("--torch or --jax",),
        {"--inputs": inputs.inputs, "--torch-axes": inputs.torch_axes, "--names": own.names, "--map": inputs.map_file},
    )


def _user_model(factory: str, own: OwnModelOptions, inputs: InputOptions) -> "Source":
    """Return where the user's own model comes from.

    Raises:
        ValueError: the inputs are missing, or the map or the axes are wrong.
        OSError: the map cannot be read.
    """
    from outlook_parity.trace.build import UserModel

    if inputs.inputs is None:
        raise ValueError("--torch and --jax need --inputs too: what the model is called with")
    name_map = name_map_from_options(inputs.map_file, inputs.torch_axes)
    return UserModel(factory, inputs.inputs, name_map, own.names)
