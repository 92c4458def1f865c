"""Image loading and preprocessing, bit for bit as in timm's evaluation."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32

from outlook_common.config import IMAGENET_MEAN, IMAGENET_STD, volo_variant
from outlook_common.extras import require
from outlook_common.weights.formats.base import PathLike

if TYPE_CHECKING:
    import PIL.Image

__all__ = ["INTERPOLATIONS", "ImageError", "Preprocessing", "load_image", "preprocess"]

INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")


class ImageError(ValueError):
    """An image that cannot be used, and why."""


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of images.

    Attributes:
        size: (rows, columns) of the result, in pixels.
        crop_pct: fraction of the resized image that is kept, along each axis; above 1 the resized image is smaller than
            the result, with a black border.
        mean: subtracted, per channel, of images in 0…1.
        std: divided by, likewise.
        interpolation: Pillow's name of the resizing filter.

    Raises:
        ValueError: a value is out of range.
    """

    size: tuple[int, int]
    crop_pct: float
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise ValueError(f"size must be at least 1x1 pixels, got {self.size[0]}x{self.size[1]}")
        if self.crop_pct <= 0:
            raise ValueError(f"crop_pct must be positive, got {self.crop_pct}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {self.interpolation!r}")

    @classmethod
    def of(cls, variant: str) -> "Preprocessing":
        """Return the preprocessing of a released variant; raise a ValueError if there is none of this name."""
        found = volo_variant(variant)
        return cls(found.config.img_size, found.crop_pct, found.mean, found.std, found.interpolation)


def load_image(path: PathLike) -> "PIL.Image.Image":
    """Read an image file as RGB, ignoring EXIF orientation as timm does.

    Raises:
        ImageError: Pillow does not know the format, the file is damaged or truncated, or it has more pixels than twice
            `PIL.Image.MAX_IMAGE_PIXELS`.
        OSError: the file cannot be opened.
        ImportError: Pillow is not installed.
    """
    require("PIL", needed_by="reading images")
    import PIL.Image

    with Path(path).open("rb") as file:
        try:
            return PIL.Image.open(file).convert("RGB")
        except PIL.UnidentifiedImageError as error:
            raise ImageError(f"{path}: not an image of a known format") from error
        except Exception as error:  # decoders raise various errors on damaged files
            what = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise ImageError(f"{path}: not a readable image: {what}") from error


def preprocess(image: "PIL.Image.Image", preprocessing: Preprocessing | str) -> Float32[np.ndarray, "rows columns 3"]:
    """Return a model's input (H, W, 3): the image resized, center-cropped and normalised.

    Args:
        image: in any mode that Pillow converts to RGB.
        preprocessing: or the name of a released variant.

    Raises:
        ImageError: the image has no pixels, or is so narrow that it would exceed Pillow's limit when resized.
        ValueError: the variant is unknown.
    """
    import PIL.Image

    how = Preprocessing.of(preprocessing) if isinstance(preprocessing, str) else preprocessing
    if min(image.size) < 1:
        raise ImageError(f"an image without pixels: {image.height}x{image.width}")
    image = image.convert("RGB")
    rows, columns = _resized_size((image.height, image.width), how)
    limit = PIL.Image.MAX_IMAGE_PIXELS
    if limit is not None and rows * columns > limit:
        raise ImageError(
            f"an image of {image.height}x{image.width} pixels is too narrow: enlarged until its shorter side fits, it "
            f"would have {rows}x{columns}, more than Pillow's limit of {limit}; cut a part out of it"
        )
    if (rows, columns) != (image.height, image.width):
        image = image.resize((columns, rows), PIL.Image.Resampling[how.interpolation.upper()])
    top, left = (_crop_start(old, new) for old, new in zip((rows, columns), how.size, strict=True))
    # Pillow fills pixels outside the image with black.
    cropped = np.asarray(image.crop((left, top, left + how.size[1], top + how.size[0])))
    pixels = cropped.astype(np.float32) / np.float32(255)
    return (pixels - np.array(how.mean, np.float32)) / np.array(how.std, np.float32)


def _resized_size(size: tuple[int, int], how: Preprocessing) -> tuple[int, int]:
    """Return (rows, columns) of which the crop is crop_pct along the tighter axis, rounded as timm does."""
    target = tuple(math.floor(side / how.crop_pct) for side in how.size)
    if target[0] == target[1]:
        short, long = min(size), max(size)
        resized = target[0], int(target[0] * long / short)
        return resized if size[0] <= size[1] else resized[::-1]
    ratio = min(old / new for old, new in zip(size, target, strict=True))
    return round(size[0] / ratio), round(size[1] / ratio)


def _crop_start(size: int, crop: int) -> int:
    """Return the start of the crop along one axis; negative if the crop is larger, smaller half first."""
    return round((size - crop) / 2) if size >= crop else -((crop - size) // 2)
