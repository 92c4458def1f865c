"""`outlook explain`: a picture of what a place of an image, and the class token, mix in each block."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from outlook_common.explain import place_weights
from outlook_common.extras import require
from outlook_common.images import load_image, place_in_input, preprocess
from outlook_parity.cli.help import epilog
from outlook_parity.cli.options import Quiet, Variant, VariantWeights
from outlook_parity.cli.predict import frameworks_of, pretrained_of
from outlook_parity.cli.progress import waiting
from outlook_parity.models.builtin import FRAMEWORKS
from outlook_parity.models.explain import ATTENTION_MAPS

EPILOG = epilog(
    "outlook explain photo.jpg --out picture.png",
    "outlook explain photo.jpg --place 120,300 --out picture.png",
    "outlook explain photo.jpg --weights volo.safetensors --out out.pdf",
)


def explain(
    image: Annotated[Path, typer.Argument(help="An image file.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The picture to write; its suffix is the format.", show_default=False)],
    place: Annotated[
        str | None, typer.Option(help="Row and column, in pixels of the image: 120,300.", show_default="the middle")
    ] = None,
    model: Variant = None,
    weights: VariantWeights = None,
    framework: Annotated[str | None, typer.Option(help="torch or jax.", show_default="what is installed")] = None,
    quiet: Quiet = False,
) -> None:
    """Draw the attention weights of a place of an image over it.

    One panel per outlooker, with the weights by which it mixes the
    neighbourhood into the place, and one per class block, with those of
    the class token; each the mean over the heads.

    Exit codes: 0 the picture is written, 2 error.
    """
    require("matplotlib", needed_by="outlook explain")
    from outlook_parity.report.explain import save_explanation

    if framework is not None and framework not in FRAMEWORKS:
        raise ValueError(f"--framework must be {' or '.join(FRAMEWORKS)}, got {framework!r}")
    name, *_ = frameworks_of(framework, "outlook explain")
    photo = load_image(image)
    with waiting("loading the weights", quiet=quiet):
        pretrained = pretrained_of(model, weights)
    how, config = pretrained.preprocessing, pretrained.config
    row, column = (photo.height // 2, photo.width // 2) if place is None else _place(place)
    at = place_in_input((photo.height, photo.width), how, (row, column))

    pixels = preprocess(photo, how)
    with waiting(f"computing in {name}", quiet=quiet):
        found = place_weights(ATTENTION_MAPS[name](pretrained, pixels), config, how.size, at)
    if not found:
        raise ValueError(f"{pretrained.source}: a model without outlookers and class blocks has nothing to draw")
    seen = np.clip((pixels * how.std + how.mean) * 255, 0, 255).round().astype(np.uint8)
    title = f"{pretrained.variant} on {image.name}: what goes into row {row}, column {column} and into the class token"
    save_explanation(out, title, seen, at, found, reach=max(config.out_kernel) + 1)


def _place(text: str) -> tuple[int, int]:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"--place must be ROW,COLUMN in pixels, as in 120,300, got {text!r}")
    return int(parts[0]), int(parts[1])
