"""Options that several commands share, and groups of options as dataclasses."""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from outlook_common.config import VOLO_VARIANTS
from outlook_parity.mapping.user import NameMap, permutation, read_name_map
from outlook_parity.models.builtin import DEFAULT_MODEL, Options

Command = Callable[..., None]

VARIANTS = f"{min(VOLO_VARIANTS)} … {max(VOLO_VARIANTS)}, see `outlook models`"  # for help texts

OWN_MODELS = "Your own models"
REPORT = "Report"
THE_LAYER = "With --model layer"

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]
Manifest = Annotated[
    bool, typer.Option("--manifest", help="Print the SHA-256 of every tensor, in PyTorch's name and layout.")
]
UseEma = Annotated[bool, typer.Option("--use-ema", help="Take the averaged (EMA) weights of a checkpoint.")]
Variant = Annotated[
    str | None,
    typer.Option("--model", help=f"A released variant: {VARIANTS}.", show_default=f"the weights', or {DEFAULT_MODEL}"),
]
VariantWeights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        help="A file, a folder or a Hub id (owner/name@revision).",
        show_default="the released ones, from the Hub",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Do not tell on stderr what is running.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random: weights, cotangents, targets.", metavar="N")]


@dataclass(frozen=True)
class LayerOptions:
    """The sizes of the layer."""

    num_heads: Annotated[
        int | None,
        typer.Option(help="Number of heads.", min=1, show_default="6, or the weight file's", rich_help_panel=THE_LAYER),
    ] = None
    kernel_size: Annotated[
        int | None,
        typer.Option(
            help="Window size in pixels.", min=1, show_default="3, or the weight file's", rich_help_panel=THE_LAYER
        ),
    ] = None
    stride: Annotated[
        int | None,
        typer.Option(
            help="Stride of the windows in pixels.",
            min=1,
            show_default="2, or the weight file's",
            rich_help_panel=THE_LAYER,
        ),
    ] = None
    padding: Annotated[
        int | None,
        typer.Option(
            help="Padding in pixels.", min=0, show_default="(kernel size - 1) // 2", rich_help_panel=THE_LAYER
        ),
    ] = None


@dataclass(frozen=True)
class ModelOptions:
    """Which of this package's models, with which weights."""

    model: Annotated[
        str | None,
        typer.Option(
            help=f"A released variant ({VARIANTS}), or layer: one outlook attention layer.",
            show_default=f"the weights', or {DEFAULT_MODEL}",
        ),
    ] = None
    weights: Annotated[
        str | None,
        typer.Option(
            help="A file, a folder or a Hub id (owner/name@revision).",
            show_default="random weights",
        ),
    ] = None
    prefix: Annotated[str, typer.Option(help="Where the model lies in the weight file: network.0.0.attn")] = ""

    def builtin(self, seed: int, layer: LayerOptions) -> Options:
        """Return what `outlook_parity.models.builtin.make` takes."""
        return Options(
            model=self.model,
            weights=self.weights,
            prefix=self.prefix,
            seed=seed,
            num_heads=layer.num_heads,
            kernel_size=layer.kernel_size,
            stride=layer.stride,
            padding=layer.padding,
        )


@dataclass(frozen=True)
class InputOptions:
    """What a user's own models are called with, and what corresponds to what in them."""

    inputs: Annotated[
        Path | None,
        typer.Option(
            help="Inputs as JAX takes them: .safetensors, .npz or .npy; several arrays in the order of their names.",
            rich_help_panel=OWN_MODELS,
        ),
    ] = None
    torch_axes: Annotated[
        str | None,
        typer.Option(
            help="Order in which PyTorch takes the axes of the inputs: 0,3,1,2",
            show_default="as JAX",
            rich_help_panel=OWN_MODELS,
        ),
    ] = None
    map_file: Annotated[
        Path | None,
        typer.Option(
            "--map",
            help="TOML file of corresponding names and axes, where Flax's conventions do not give them.",
            rich_help_panel=OWN_MODELS,
        ),
    ] = None


@dataclass(frozen=True)
class ProgressOptions:
    """What is told while a command runs."""

    quiet: Quiet = False


@dataclass(frozen=True)
class ReportOptions:
    """Where a report goes."""

    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML page.", rich_help_panel=REPORT)] = None
    junit: Annotated[
        Path | None, typer.Option(help="Write the report as JUnit XML, for CI.", rich_help_panel=REPORT)
    ] = None
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", help="Print every row with its metrics, not a summary.", rich_help_panel=REPORT
        ),
    ] = False
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print the report as JSON, and nothing else.", rich_help_panel=REPORT),
    ] = False


def grouped(command: Command) -> Command:
    """Let a command take its options in groups: each parameter is a dataclass, each field of it an option.

    Typer reads the flat list of options from the signature that is set here.
    """
    groups: dict[str, Any] = {
        name: parameter.annotation for name, parameter in inspect.signature(command).parameters.items()
    }
    options = [option for group in groups.values() for option in fields(group)]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        command(**{
            name: group(**{option.name: values[option.name] for option in fields(group)})
            for name, group in groups.items()
        })  # fmt: skip

    run.__signature__ = inspect.Signature([  # type: ignore[attr-defined]
        inspect.Parameter(
            option.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if option.default is MISSING else option.default,
            annotation=option.type,
        )
        for option in options
    ])  # fmt: skip
    run.__annotations__ = {option.name: option.type for option in options}
    return run


def refuse_without(needed: Sequence[str], given: dict[str, Any]) -> None:
    """Raise a ValueError if an option is given that means nothing without others.

    Args:
        needed: the options that are not there, as in "--torch".
        given: option -> its value, None if it is not given.
    """
    *first, last = needed
    together = f"{', '.join(first)} and {last}" if first else last
    for option, value in given.items():
        if value is not None:
            raise ValueError(f"{option} is for your own models only: it needs {together} too")


def name_map_from_options(map_file: Path | None, torch_axes: str | None) -> NameMap:
    """Return the name map of `--map` and `--torch-axes`; where both give the axes, the option holds.

    Args:
        map_file: see `read_name_map`.
        torch_axes: one order of axes, as in "0,3,1,2".

    Raises:
        ValueError: the file has unknown entries, or the axes are no permutation.
        OSError: the file cannot be read.
    """
    name_map = NameMap() if map_file is None else read_name_map(map_file)
    if torch_axes is None:
        return name_map
    return replace(name_map, torch_axes=permutation(_integers(torch_axes), "--torch-axes"))


def waivers_from_options(ignore: Sequence[str]) -> dict[str, str]:
    """Return the waivers of `--ignore`, "PATTERN=REASON" each, as reasons by pattern.

    Raises:
        ValueError: one has no pattern or no reason.
    """
    waivers = {}
    for text in ignore:
        pattern, _, reason = (part.strip() for part in text.partition("="))
        if not (pattern and reason):
            raise ValueError(f"--ignore must be PATTERN=REASON, as in '*.mask_token=unused', got {text!r}")
        waivers[pattern] = reason
    return waivers


def _integers(text: str) -> list[int | str]:
    """Split "0,3,1,2" at its commas; what is no integer stays a string, for the error message."""
    parts = map(str.strip, text.split(","))
    return [int(part) if part.isdecimal() else part for part in parts]
