"""`outlook predict`: what both twins see in images."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from outlook_common.config import VOLO_VARIANTS, volo_variant
from outlook_common.extras import require
from outlook_common.images import ImageError, load_image, preprocess
from outlook_common.pretrained import Pretrained, prepare
from outlook_parity.cli.exit_codes import ERROR, MISMATCH
from outlook_parity.models.predict import FORWARDS, Prediction, predict_batch

DEFAULT_MODEL = "volo_d1_224"
_CHANNELS = 3  # of images as they are read
FRAMEWORKS = {"torch": ("torch",), "jax": ("jax", "flax")}  # and what they need, each the extra of its name


@dataclass(frozen=True)
class Unreadable:
    """An image that could not be used, and why."""

    path: str
    error: str


def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files, and folders of them.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option(
            help=f"A released variant: {', '.join(VOLO_VARIANTS)}.", show_default=f"the weights', or {DEFAULT_MODEL}"
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="A file, a folder or a Hub id (owner/name@revision).", show_default="those released on the Hub"
        ),
    ] = None,
    framework: Annotated[str | None, typer.Option(help="torch, jax or both.", show_default="what is installed")] = None,
    top: Annotated[int, typer.Option(help="How many classes to show.", min=1)] = 5,
    batch_size: Annotated[int, typer.Option(help="How many images are computed at once.", min=1)] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")] = False,
) -> None:
    """Show the most probable classes of images, in both twins side by side.

    Images are prepared as the variant's are: Pillow's bicubic resizing, a crop around the centre, mean and deviation.

    Exit codes: 0 the twins' first labels agree, 1 they do not, 2 error, also if any image could not be read.
    """
    frameworks = _frameworks(framework)
    paths = _image_files(images)
    pretrained = _pretrained(model, weights)
    notes = Console(stderr=True)
    unreadable: list[Unreadable] = []
    predictions: list[Prediction] = []
    with _progress(notes, len(paths)) as advance:
        forwards = {name: FORWARDS[name](pretrained) for name in frameworks}
        for batch in _batches(paths, pretrained, batch_size, unreadable, advance):
            predictions += predict_batch(batch, forwards, pretrained.config.num_classes, top)
            advance(len(batch))
    if as_json:
        _print_json(pretrained, frameworks, predictions, unreadable)
    else:
        for prediction in predictions:
            Console().print(_table(prediction))
    _finish(predictions, unreadable, notes)


def _frameworks(asked: str | None) -> tuple[str, ...]:
    """Return the frameworks to use; None means those that are installed."""
    here = tuple(name for name, needs in FRAMEWORKS.items() if all(find_spec(need) for need in needs))
    choices: dict[str | None, tuple[str, ...]] = {None: here or tuple(FRAMEWORKS), "both": tuple(FRAMEWORKS)}
    choices |= {name: (name,) for name in FRAMEWORKS}
    if asked not in choices:
        raise ValueError(f"framework must be one of {', '.join(FRAMEWORKS)} or both, got {asked!r}")
    for name in choices[asked]:
        for need in FRAMEWORKS[name]:
            require(need, extra=name, needed_by="outlook predict")
    return choices[asked]


def _image_files(images: Sequence[Path]) -> list[Path]:
    """Return the files, and those in the folders, at any depth, that end as images do."""
    require("PIL", extra="parity", needed_by="outlook predict")
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
            raise FileNotFoundError(f"{image}: a folder without images, that is without files that end as images do")
        paths += found
    return paths


def _pretrained(model: str | None, weights: str | None) -> Pretrained:
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
        raise ValueError(f"{found.source}: a model without classifier, there is nothing to predict")
    if (channels := found.config.in_chans) != _CHANNELS:
        raise ValueError(
            f"{found.source}: weights for images of in_chans={channels} channels, images are read with {_CHANNELS}; "
            f"--model {found.variant} makes the first convolution one for those"
        )
    return found


def _batches(
    paths: Sequence[Path],
    pretrained: Pretrained,
    batch_size: int,
    unreadable: list[Unreadable],
    advance: Callable[[int], None],
) -> Iterator[list[tuple[Path, np.ndarray]]]:
    """Yield up to `batch_size` images at a time, ready for the model; those that cannot be read go to `unreadable`."""
    batch = []
    for path in paths:
        try:
            batch.append((path, preprocess(load_image(path), pretrained.preprocessing)))
        except (ImageError, OSError) as error:
            words = str(error)
            unreadable.append(Unreadable(str(path), words if str(path) in words else f"{path}: {words}"))
            advance(1)
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
    for place, row in enumerate(zip(*prediction.guesses.values(), strict=True), start=1):
        cells = [cell for guess in row for cell in (escape(guess.label), f"{guess.probability:.2%}")]
        table.add_row(str(place), *cells)
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


def _finish(predictions: Sequence[Prediction], unreadable: Sequence[Unreadable], notes: Console) -> None:
    differing = [prediction for prediction in predictions if prediction.agree is False]
    for image in unreadable:
        notes.print(f"[bold red]error:[/] {escape(image.error)}", highlight=False, soft_wrap=True)
    for prediction in differing:
        labels = ", ".join(f"{name}: {guesses[0].label}" for name, guesses in prediction.guesses.items())
        notes.print(f"[bold red]the twins disagree:[/] {escape(f'{prediction.path}: {labels}')}", soft_wrap=True)
    if differing:
        raise typer.Exit(MISMATCH)
    if unreadable:
        raise typer.Exit(ERROR)


@contextmanager
def _progress(console: Console, images: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal if there are several images, and nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=images < 2 or not console.is_terminal) as bar:
        task = bar.add_task("images", total=images)
        yield lambda done: bar.update(task, advance=done)
