"""`outlook predict`: the most probable classes of images, in both twins."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from outlook_common.config import volo_variant
from outlook_common.extras import is_installed, require
from outlook_common.images import ImageError, load_image, preprocess
from outlook_common.pretrained import Pretrained, prepare
from outlook_common.text import listed
from outlook_parity.cli.exit_codes import ERROR, MISMATCH
from outlook_parity.cli.help import epilog
from outlook_parity.cli.options import AsJson, Quiet, Variant, VariantWeights
from outlook_parity.cli.output import print_error
from outlook_parity.cli.progress import steps, waiting
from outlook_parity.models.builtin import DEFAULT_MODEL, FRAMEWORKS, IMAGE_CHANNELS
from outlook_parity.models.predict import FORWARDS, Prediction, predict_batch

EPILOG = epilog(
    "outlook predict photo.jpg",
    "outlook predict photos/ --framework torch --top 3",
    "outlook predict photo.jpg --weights volo.safetensors --json",
)


@dataclass(frozen=True)
class Unreadable:
    """An image that cannot be read, and why."""

    path: str
    error: str


def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.", show_default=False)],
    model: Variant = None,
    weights: VariantWeights = None,
    framework: Annotated[str | None, typer.Option(help="torch, jax or both.", show_default="what is installed")] = None,
    top: Annotated[int, typer.Option(help="Number of classes to show.", min=1)] = 5,
    batch_size: Annotated[int, typer.Option(help="Number of images computed at once.", min=1)] = 8,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show the most probable classes of images, both twins side by side.

    Images are prepared as for the variant: bicubic resizing (Pillow), a
    crop of the centre, normalisation by mean and deviation.

    Exit codes: 0 the first labels agree, 1 they do not, 2 error (also an
    image that cannot be read).
    """
    frameworks = frameworks_of(framework, "outlook predict")
    paths = _image_files(images)
    unreadable: list[Unreadable] = []
    predictions: list[Prediction] = []
    with waiting("loading the weights", quiet=quiet):
        pretrained = pretrained_of(model, weights)
    with steps("loading the frameworks", quiet=quiet) as step:
        forwards = {name: FORWARDS[name](pretrained) for name in frameworks}
        for batch in _batches(paths, pretrained, batch_size, unreadable):
            step(batch[0][0].name, len(predictions) + len(unreadable), len(paths))
            predictions += predict_batch(batch, forwards, pretrained.config.num_classes, top)
        step("", len(paths), len(paths))
    if as_json:
        _print_json(pretrained, frameworks, predictions, unreadable)
    else:
        for prediction in predictions:
            Console().print(_table(prediction))
    _finish(predictions, unreadable)


def frameworks_of(framework: str | None, needed_by: str) -> tuple[str, ...]:
    """Return the frameworks to use; None means those that are installed."""
    installed = tuple(name for name, needs in FRAMEWORKS.items() if all(map(is_installed, needs)))
    choices: dict[str | None, tuple[str, ...]] = {None: installed, "both": tuple(FRAMEWORKS)}
    choices |= {name: (name,) for name in FRAMEWORKS}
    if framework not in choices:
        raise ValueError(f"--framework must be {', '.join(FRAMEWORKS)} or both, got {framework!r}")
    if not choices[framework]:
        extras = " or ".join(f"'outlook-attention[{name}]'" for name in FRAMEWORKS)
        raise ImportError(f"{needed_by} needs {' or '.join(FRAMEWORKS)}, install one with: pip install {extras}")
    require(*(module for name in choices[framework] for module in FRAMEWORKS[name]), needed_by=needed_by)
    return choices[framework]


def _image_files(images: Sequence[Path]) -> list[Path]:
    """Return the files, and the images in folders at any depth, by their suffixes."""
    require("PIL", needed_by="outlook predict")
    import PIL.Image

    known = PIL.Image.registered_extensions()
    suffixes = {suffix for suffix, kind in known.items() if kind in PIL.Image.OPEN}
    paths = []
    for image in images:
        if not image.is_dir():
            paths.append(image)
            continue
        found = sorted(path for path in image.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
        if not found:
            raise FileNotFoundError(f"{image}: no images in this folder: no file ends in {listed(sorted(suffixes))}")
        paths += found
    return paths


def pretrained_of(model: str | None, weights: str | None) -> Pretrained:
    """Return the model of `--model` and `--weights`, which takes photos and predicts classes."""
    found = prepare(
        weights or volo_variant(model or DEFAULT_MODEL).hub_id,
        variant=model,
        num_classes=None,
        img_size=None,
        prefix="",
        use_ema=False,
        revision=None,
        token=None,
        cache_dir=None,
        local_files_only=False,
        overrides={},
    )
    if found.config.num_classes == 0:
        raise ValueError(f"{found.source}: a model without classifier (num_classes=0) predicts no classes")
    if (channels := found.config.in_chans) != IMAGE_CHANNELS:
        raise ValueError(
            f"{found.source}: a model for images of in_chans={channels} channels, images are read with "
            f"{IMAGE_CHANNELS}; --model {found.variant} adapts the first convolution"
        )
    return found


def _batches(
    paths: Sequence[Path],
    pretrained: Pretrained,
    batch_size: int,
    unreadable: list[Unreadable],
) -> Iterator[list[tuple[Path, np.ndarray]]]:
    """Yield up to `batch_size` images at a time, ready for the model; those that cannot be read go to `unreadable`."""
    batch = []
    for path in paths:
        try:
            batch.append((path, preprocess(load_image(path), pretrained.preprocessing)))
        except (ImageError, OSError) as error:
            message = str(error)
            unreadable.append(Unreadable(str(path), message if str(path) in message else f"{path}: {message}"))
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _table(prediction: Prediction) -> Table:
    style = "red" if prediction.agree is False else None
    table = Table("", title=escape(prediction.path), title_justify="left", border_style=style)
    for name in prediction.guesses:
        table.add_column(name, overflow="fold")
        table.add_column("", justify="right")
    for rank, row in enumerate(zip(*prediction.guesses.values(), strict=True), start=1):
        cells = [cell for guess in row for cell in (escape(guess.label), f"{guess.probability:.2%}")]
        table.add_row(str(rank), *cells)
    return table


def _print_json(
    pretrained: Pretrained,
    frameworks: Sequence[str],
    predictions: Sequence[Prediction],
    unreadable: Sequence[Unreadable],
) -> None:
    found = {
        "model": pretrained.variant,
        "weights": pretrained.source,
        "frameworks": list(frameworks),
        "images": [asdict(prediction) for prediction in predictions],
        "unreadable": [asdict(image) for image in unreadable],
    }
    typer.echo(json.dumps(found))


def _finish(predictions: Sequence[Prediction], unreadable: Sequence[Unreadable]) -> None:
    """Print what went wrong, and end with the exit code of it."""
    differing = [prediction for prediction in predictions if prediction.agree is False]
    for image in unreadable:
        print_error(image.error)
    for prediction in differing:
        labels = ", ".join(f"{name}: {guesses[0].label}" for name, guesses in prediction.guesses.items())
        print_error(f"{prediction.path}: {labels}", label="the twins disagree")
    if differing:
        raise typer.Exit(MISMATCH)
    if unreadable:
        raise typer.Exit(ERROR)
