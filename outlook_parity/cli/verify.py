"""`outlook verify`: do two twins compute the same thing?"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from outlook_parity.backends.exported.registry import is_program_file
from outlook_parity.cli.help import epilog
from outlook_parity.cli.options import (
    OWN_MODELS,
    REPORT,
    InputOptions,
    LayerOptions,
    ModelOptions,
    Quiet,
    ReportOptions,
    Seed,
    grouped,
    name_map_from_options,
    refuse_without,
    waivers_from_options,
)
from outlook_parity.cli.output import finish
from outlook_parity.cli.progress import steps
from outlook_parity.core.plan import STEPS
from outlook_parity.core.precision import IN_WORDS
from outlook_parity.models.builtin import Model, Options, enough_for, make
from outlook_parity.models.user import load_factory, read_inputs

if TYPE_CHECKING:
    from outlook_parity.report.report import Report

EPILOG = epilog(
    "outlook verify --model layer",
    "outlook verify --model volo_d1_224 --weights timm/volo_d1_224.sail_in1k",
    "outlook verify --torch my_torch:model --jax my_jax:model --inputs x.npy",
)


SPREAD = "Several devices"
RUN = "What runs"


@dataclass(frozen=True)
class RunOptions:
    """What is computed, in which precisions and where."""

    level: Annotated[
        list[str] | None,
        typer.Option(
            help="forward, layers, gradients or training; repeatable.",
            show_default="all",
            metavar="LEVEL",
            rich_help_panel=RUN,
        ),
    ] = None
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{IN_WORDS}; repeatable.", show_default="float64 and float32", metavar="DTYPE", rich_help_panel=RUN
        ),
    ] = None
    training_dtype: Annotated[
        list[str] | None,
        typer.Option(
            help="Which of the dtypes to train in; repeatable.",
            show_default="the first: training is slow",
            metavar="DTYPE",
            rich_help_panel=RUN,
        ),
    ] = None
    steps: Annotated[
        int,
        typer.Option(help="Training steps, with SGD and with AdamW.", min=1, metavar="N", rich_help_panel=RUN),
    ] = STEPS
    device: Annotated[
        str,
        typer.Option(help="Where the lower precisions run: cpu, gpu or tpu.", metavar="DEVICE", rich_help_panel=RUN),
    ] = "cpu"
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            help="Skip rows whose names match: '*.mask_token=unused'; repeatable.",
            show_default=False,
            metavar="PATTERN=REASON",
            rich_help_panel=RUN,
        ),
    ] = None
    memory: Annotated[
        str | None,
        typer.Option(
            help="What the process may hold, as in 2GiB; levels that take more are not run.",
            metavar="SIZE",
            rich_help_panel=RUN,
        ),
    ] = None
    seed: Seed = 0
    devices: Annotated[
        int | None,
        typer.Option(
            help="Spread JAX's twin over so many devices.",
            min=2,
            show_default="as it is",
            metavar="N",
            rich_help_panel=SPREAD,
        ),
    ] = None
    sharding: Annotated[
        str,
        typer.Option(
            help="How: data (each a part of the batch), or fsdp (the weights are split too).",
            metavar="RULES",
            rich_help_panel=SPREAD,
        ),
    ] = "data"
    quiet: Quiet = False


@dataclass(frozen=True)
class TwinOptions:
    """The user's own models."""

    torch_factory: Annotated[
        str | None,
        typer.Option(
            "--torch",
            help="PyTorch model: package.module:factory; or an exported program: .onnx, .pt2, .jax_export.",
            rich_help_panel=OWN_MODELS,
        ),
    ] = None
    jax_factory: Annotated[
        str | None,
        typer.Option(
            "--jax",
            help="JAX model: a factory of a module, a function, or a pair (module or function, weights); or a program.",
            rich_help_panel=OWN_MODELS,
        ),
    ] = None


@dataclass(frozen=True)
class MapOptions:
    """What becomes of the correspondence that was found."""

    write_map: Annotated[
        Path | None,
        typer.Option(help="Write what corresponds to what, as --map reads it.", rich_help_panel=OWN_MODELS),
    ] = None


@dataclass(frozen=True)
class PictureOptions:
    """The picture of the result."""

    plot: Annotated[
        Path | None,
        typer.Option(help="Write a picture: the photo and where the twins differ.", rich_help_panel=REPORT),
    ] = None


@grouped
def verify(
    model: ModelOptions,
    run: RunOptions,
    twins: TwinOptions,
    inputs: InputOptions,
    layer: LayerOptions,
    found_map: MapOptions,
    picture: PictureOptions,
    report: ReportOptions,
) -> None:
    """Verify that the PyTorch and the JAX twin compute the same thing.

    Compared: outputs, every module, gradients of inputs and
    parameters, and training steps. float64 must agree to rounding;
    in each lower precision both twins must be equally exact.

    Inputs: the two photos of scikit-learn, prepared as the variant's
    images are. With --model layer one photo, as a map of 28x28 pixels
    with 192 channels: the first that VOLO-D1's outlook attention sees.

    Your own models: --torch, --jax and --inputs; see
    docs/port-a-model.md. A file with an exported program (.onnx, .pt2,
    .jax_export) takes the place of either twin, at the level forward;
    without --inputs it is compared with --model. Modules and .pt2 files
    are executed: name none that you do not trust.

    --devices 8 runs the JAX twin on eight devices, which a CPU passes
    for, and PyTorch's in one process; photos are repeated, shifted,
    until each device has one.

    Exit codes: 0 pass, 1 mismatch, 2 error, 3 not run (no such device
    here, none with TF32, or more memory needed than --memory).
    """
    _check(twins, inputs, picture, found_map)
    name_map = name_map_from_options(inputs.map_file, inputs.torch_axes)
    dtypes = run.dtype or ["float64", "float32"]
    with steps("loading the frameworks", quiet=run.quiet) as step:
        from outlook_parity.api import verify as verify_models

        if run.devices:
            from outlook_parity.backends.jax.placement import make_cpu_devices

            make_cpu_devices(run.devices)
        pair = _user_models(twins, inputs) or _built_in(model.builtin(run.seed, layer), twins, run.devices or 1)
        found = verify_models(
            pair.torch_model,
            pair.jax_model,
            pair.inputs,
            dtypes=dtypes,
            training_dtypes=run.training_dtype or dtypes[:1],
            device=run.device,
            seed=run.seed,
            steps=run.steps,
            memory=run.memory,
            progress=step,
            levels=run.level,
            names=name_map,
            ignore=waivers_from_options(run.ignore or []),
            write_map=found_map.write_map,
            devices=run.devices,
            sharding=run.sharding,
        )
    plot = picture.plot if found.verdict != "not-run" else None
    if plot is not None:
        _save_picture(plot, pair, found, run)
    finish(found, report, title=pair.title, picture=plot)


def _check(twins: TwinOptions, inputs: InputOptions, picture: PictureOptions, found_map: MapOptions) -> None:
    """Raise a ValueError if options contradict each other."""
    programs = [name for name in (twins.torch_factory, twins.jax_factory) if name and is_program_file(name)]
    if programs and picture.plot is not None:
        raise ValueError(f"--plot shows this package's models on a photo, not {programs[0]}; --html shows the report")
    if twins.torch_factory is None:
        given = {"--map": inputs.map_file, "--torch-axes": inputs.torch_axes, "--write-map": found_map.write_map}
        refuse_without(("--torch", "--jax", "--inputs"), given)
    elif picture.plot is not None:
        raise ValueError("--plot shows this package's models on a photo; for your own models --html shows the report")


def _save_picture(path: Path, pair: Model, report: "Report", run: RunOptions) -> None:
    """Write where the outputs differ if they are a map, else how exact the gradients are."""
    from outlook_parity.api import difference_map
    from outlook_parity.report.plot import save_gradients, save_map

    if pair.inputs.shape[-1] == pair.photo.shape[-1]:
        return save_gradients(path, pair.photo, report)
    difference = difference_map(pair.torch_model, pair.jax_model, pair.inputs, device=run.device, seed=run.seed)
    return save_map(path, pair.photo, difference, report)


def _built_in(options: Options, twins: TwinOptions, devices: int) -> Model:
    """Return this package's twins, one replaced by an exported program if one is named."""
    programs = {"torch": twins.torch_factory, "jax": twins.jax_factory}
    pair = enough_for(make(options, [twin for twin, program in programs.items() if program is None]), devices)
    for twin, program in programs.items():
        if program is not None:
            title = f"{pair.title}, {Path(program).name} in place of {twin}"
            changes: dict[str, Any] = {f"{twin}_model": Path(program), "title": title}
            pair = replace(pair, **changes)
    return pair


def _one_program(twins: TwinOptions) -> bool:
    """Whether one twin is named, and that is an exported program."""
    names = [name for name in (twins.torch_factory, twins.jax_factory) if name]
    return len(names) == 1 and is_program_file(names[0])


def _twin(name: str, option: str) -> Any:
    """Return the file of an exported program, or the model of a factory."""
    if is_program_file(name):
        return Path(name)
    from outlook_parity.backends.jax.work import unoptimized

    with unoptimized():  # initializers run once
        return load_factory(name, option)


def _user_models(twins: TwinOptions, inputs: InputOptions) -> Model | None:
    """Return the user's own models, None if none are named.

    Raises:
        ValueError: only some of the three options are given, or a factory fails.
        OSError: the inputs cannot be read.
    """
    torch_factory, jax_factory, path = twins.torch_factory, twins.jax_factory, inputs.inputs
    given = {"--torch": torch_factory, "--jax": jax_factory, "--inputs": path}
    if not any(given.values()) or (path is None and _one_program(twins)):
        return None
    if not (torch_factory and jax_factory and path):
        missing = " and ".join(option for option, value in given.items() if not value)
        raise ValueError(f"your own models need --torch, --jax and --inputs; {missing} not given")
    arrays = read_inputs(path)
    shapes = ", ".join(f"{array.dtype} {array.shape}" for array in arrays.values())
    return Model(
        title=f"{torch_factory} and {jax_factory} on {path.name}, {shapes}",
        torch_model=_twin(torch_factory, "--torch"),
        jax_model=_twin(jax_factory, "--jax"),
        inputs=arrays,
        photo=np.zeros((1, 1, 3), np.uint8),
    )
