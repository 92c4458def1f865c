"""`outlook trace`."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from outlook_parity.cli.exit_codes import NOT_RUN
from outlook_parity.core.precision import IN_WORDS


def trace(
    framework: Annotated[str, typer.Option(help="torch or jax: whose twin runs here.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The file to write.", show_default=False)],
    model: Annotated[str, typer.Option(help="A released variant, or layer: as of `outlook verify`.")] = "volo_d1_224",
    weights: Annotated[
        str | None, typer.Option(help="A weight file or Hub id.", show_default="random weights of the seed")
    ] = None,
    prefix: Annotated[str, typer.Option(help="Where in the file the model lies.")] = "",
    factory: Annotated[str | None, typer.Option(help="Your own model instead: package.module:factory.")] = None,
    inputs: Annotated[Path | None, typer.Option(help="Its inputs, as JAX takes them.")] = None,
    torch_axes: Annotated[
        str | None,
        typer.Option(help="The order in which PyTorch takes their axes, as in 0,3,1,2.", show_default="as JAX"),
    ] = None,
    names: Annotated[
        Path | None,
        typer.Option(help="For your own JAX model: the torch trace, whose names its weights are to have."),
    ] = None,
    map_file: Annotated[
        Path | None, typer.Option("--map", help="TOML: what corresponds to what, where the names do not say it.")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"{IN_WORDS}.")] = "float64",
    rounded_to: Annotated[
        str | None, typer.Option(help="Round inputs and weights to this first: for a truth.", show_default="the dtype")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, gpu or tpu.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of random weights and of the cotangent.")] = 0,
    gradients: Annotated[bool, typer.Option(help="Write gradients too.")] = True,
    layers: Annotated[bool, typer.Option(help="Write what every module is called with and gives.")] = True,
) -> None:
    """Write what one twin computes to a file; only its own framework is needed.

    Weights of your own JAX model that have no counterpart in --names, or are lacking, are told of on stderr at once; if
    none has one, that is an error.

    Exit codes: 0 written, 2 error, 3 no such device here, or none with TF32.
    """
    from outlook_parity.trace.record import Asked, write_trace

    kinds: dict[str, Literal["torch", "jax"]] = {"torch": "torch", "jax": "jax"}
    if framework not in kinds:
        raise ValueError(f"--framework must be torch or jax, got {framework!r}")
    asked = Asked(
        kinds[framework],
        model,
        weights,
        prefix,
        factory,
        inputs,
        torch_axes,
        names,
        map_file,
        dtype,
        rounded_to or dtype,
        device,
        seed,
        gradients,
        layers,
    )
    console = Console(stderr=True)

    def tell(what: str) -> None:
        console.print(what, style="yellow", highlight=False, markup=False, soft_wrap=True)

    reason = write_trace(asked, out, lambda note: tell(f"note: {note}"))
    if reason is not None:
        tell(f"NOT RUN: {reason}")
        raise typer.Exit(NOT_RUN)
    Console().print(f"trace: {out}", highlight=False, soft_wrap=True)
