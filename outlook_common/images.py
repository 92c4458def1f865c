"""Image loading and preprocessing, bit for bit as in timm's evaluation."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32, Shaped, UInt8

from outlook_common.config import IMAGENET_MEAN, IMAGENET_STD, volo_variant
from outlook_common.extras import require
from outlook_common.weights.formats.base import PathLike

if TYPE_CHECKING:
    import PIL.Image

__all__ = ["INTERPOLATIONS", "ImageError", "Preprocessing", "load_image", "preprocess"]

# A path, a Pillow image, or an array of any framework.
Images = Any

# Grey, RGB, RGB with an alpha channel.
CHANNELS = (1, 3, 4)

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


def preprocess(
    images: Images | Sequence[Images], preprocessing: Preprocessing | str
) -> Float32[np.ndarray, "*B rows columns 3"]:
    """Return a model's input: images resized, center-cropped and normalised.

    Args:
        images: one image or several:

            - a path, read as `load_image` does;
            - a Pillow image, in any mode that Pillow converts to RGB;
            - an array (H, W, 3), (H, W, 4) with an alpha channel, which is dropped, or (H, W) and (H, W, 1) in grey:
              bytes, or floats in 0…1, which are rounded to bytes. NumPy's, or what NumPy converts: JAX's arrays,
              PyTorch's tensors on the CPU;
            - an array (B, H, W, channels), or a list or tuple of any of these, of any sizes.
        preprocessing: or the name of a released variant.

    Returns:
        (H, W, 3) of one image, (B, H, W, 3) of several.

    Raises:
        ImageError: an image cannot be read, has another shape or dtype, floats beyond 0…1 or no pixels, or is so narrow
            that it would exceed Pillow's limit when resized; of several it says which.
        OSError: a file cannot be opened.
        ValueError: the variant is unknown.
        ImportError: Pillow is not installed.
    """
    how = Preprocessing.of(preprocessing) if isinstance(preprocessing, str) else preprocessing
    several = images if isinstance(images, list | tuple) else _batch(images)
    if several is None:
        return _prepared(_opened(images), how)
    prepared = []
    for index, image in enumerate(several):
        try:
            prepared.append(_prepared(_opened(image), how))
        except ImageError as error:
            raise ImageError(f"images[{index}]: {error}") from error
    if not prepared:
        raise ImageError("no images: the batch is empty")
    return np.stack(prepared)


def place_in_input(size: tuple[int, int], how: Preprocessing, place: tuple[int, int]) -> tuple[int, int]:
    """Return where a pixel of an image lies in its preprocessed form.

    Args:
        size: (rows, columns) of the image.
        how: the preprocessing.
        place: (row, column) of the image.

    Raises:
        ValueError: the place lies outside the image, or is cut off.
    """
    found = []
    resized = _resized_size(size, how)
    for name, at, old, new, shown in zip(("row", "column"), place, size, resized, how.size, strict=True):
        if not 0 <= at < old:
            raise ValueError(f"{name} {at} lies outside the image of {size[0]}x{size[1]} pixels")
        start = _crop_start(new, shown)
        places = [math.floor((pixel + 0.5) * new / old) - start for pixel in range(old)]
        inside = [pixel for pixel in range(old) if 0 <= places[pixel] < shown]
        if at not in inside:
            raise ValueError(f"{name} {at} is cut off: the model sees {name}s {inside[0]} to {inside[-1]}")
        found.append(places[at])
    return found[0], found[1]


def _batch(images: Any) -> list[Any] | None:
    """Return the images of an array with a batch axis, or None."""
    shape = getattr(images, "shape", None)
    return list(np.asarray(images)) if shape is not None and len(shape) == 4 else None


def _opened(image: Any) -> "PIL.Image.Image":
    """Return one image, given in any way, as Pillow's."""
    require("PIL", needed_by="preparing images")
    import PIL.Image

    if isinstance(image, PIL.Image.Image):
        return image
    if isinstance(image, str | os.PathLike):
        return load_image(image)
    if not hasattr(image, "__array__"):
        raise ImageError(
            f"an image of type {type(image).__name__}: expected a path, a Pillow image or an array (H, W, channels)"
        )
    pixels = np.asarray(image)
    shape = " x ".join(map(str, pixels.shape)) or "no axes"
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in CHANNELS):
        first = pixels.ndim == 3 and pixels.shape[0] in CHANNELS
        hint = f"; axis 0 is {pixels.shape[0]}: are they first? transpose(1, 2, 0) puts them last" if first else ""
        raise ImageError(
            f"an array of shape {shape}: expected (H, W), or (H, W, channels) with 1, 3 or 4 channels{hint}"
        )
    if min(pixels.shape[:2]) < 1:
        raise ImageError(f"an image without pixels: {pixels.shape[0]}x{pixels.shape[1]}")
    return PIL.Image.fromarray(_bytes(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels))


def _bytes(pixels: Shaped[np.ndarray, "H W ..."]) -> UInt8[np.ndarray, "H W ..."]:
    """Return pixels as bytes; floats in 0…1 are rounded."""
    if pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels)
    if not np.issubdtype(pixels.dtype, np.floating):
        raise ImageError(f"an array of {pixels.dtype}: expected uint8 in 0…255 or floats in 0…1")
    rounded = np.rint(pixels.astype(np.float64) * 255)
    if not ((rounded >= 0) & (rounded <= 255)).all():  # NaN neither
        raise ImageError(
            f"an array of {pixels.dtype} with values from {pixels.min():.4g} to {pixels.max():.4g}: expected floats in "
            "0…1, not yet normalised, or uint8"
        )
    return rounded.astype(np.uint8)


def _prepared(image: "PIL.Image.Image", how: Preprocessing) -> Float32[np.ndarray, "rows columns 3"]:
    import PIL.Image

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
