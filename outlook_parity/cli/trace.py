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
    Seed,
    grouped,
    name_map_from_options,
    refuse_without,
)
from outlook_parity.cli.output import print_line
from outlook_parity.core.precision import IN_WORDS

if TYPE_CHECKING:
    from outlook_parity.trace.build import Source

EPILOG = epilog(
    "outlook trace --framework torch --model layer --out torch.trace",
    "outlook trace --framework jax --model layer --out jax.trace",
    "outlook compare torch.trace jax.trace",
)


@dataclass(frozen=True)
class FileOptions:
    """Which twin, and the file to write."""

    framework: Annotated[str, typer.Option(help="Which twin runs here: torch or jax.", show_default=False)]
    out: Annotated[Path, typer.Option(help="The file to write.", show_default=False)]


@dataclass(frozen=True)
class OwnModelOptions:
    """The user's own model."""

    factory: Annotated[str | None, typer.Option(help="Model: package.module:factory.", rich_help_panel=OWN_MODELS)] = (
        None
    )
    names: Annotated[
        Path | None,
        typer.Option(help="For a JAX model: the torch trace, for names of weights.", rich_help_panel=OWN_MODELS),
    ] = None


@dataclass(frozen=True)
class RunOptions:
    """What is computed, in which precision and where."""

    dtype: Annotated[str, typer.Option(help=f"{IN_WORDS}.")] = "float64"
    rounded_to: Annotated[
        str | None,
        typer.Option(help="Round inputs and weights to this precision first: for a truth.", show_default="the dtype"),
    ] = None
    device: Annotated[str, typer.Option(help="cpu, gpu or tpu.")] = "cpu"
    seed: Seed = 0
    gradients: Annotated[bool, typer.Option(help="Write gradients too.")] = True
    layers: Annotated[bool, typer.Option(help="Write inputs and outputs of every module.")] = True


@grouped
def trace(file: FileOptions, model: ModelOptions, own: OwnModelOptions, inputs: InputOptions, run: RunOptions) -> None:
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

    request = TraceRequest(
        framework=file.framework,
        dtype=run.dtype,
        rounded_to=run.rounded_to or run.dtype,
        device=run.device,
        seed=run.seed,
        gradients=run.gradients,
        modules=run.layers,
    )
    reason = record(request, _source(model, own, inputs, run.seed), file.out, lambda note: _warn(f"note: {note}"))
    if reason is not None:
        _warn(f"NOT RUN: {reason}")
        raise typer.Exit(NOT_RUN)
    print_line(f"trace: {file.out}")


def _warn(text: str) -> None:
    print_line(text, style="yellow", stderr=True)


def _source(model: ModelOptions, own: OwnModelOptions, inputs: InputOptions, seed: int) -> "Source":
    """Return where the model comes from.

    Raises:
        ValueError: options contradict each other, or the map or the axes are wrong.
        OSError: the map cannot be read.
    """
    from outlook_parity.trace.build import UserModel

    if own.factory is None:
        refuse_without(
            ("--factory",),
            {
                "--inputs": inputs.inputs,
                "--torch-axes": inputs.torch_axes,
                "--names": own.names,
                "--map": inputs.map_file,
            },
        )
        return model.builtin(seed, LayerOptions())
    if inputs.inputs is None:
        raise ValueError("--factory needs --inputs too: what the model is called with")
    name_map = name_map_from_options(inputs.map_file, inputs.torch_axes)
    return UserModel(own.factory, inputs.inputs, name_map, own.names)
