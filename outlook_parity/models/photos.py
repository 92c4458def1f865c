"""Photos as inputs of `outlook verify`, whole and as a map of patches."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from outlook_common.extras import require

if TYPE_CHECKING:
    import PIL.Image

PHOTOS = ("china.jpg", "flower.jpg")
SIZE = 224
PATCH = 8
CHANNELS = 3 * PATCH**2


def load_photos() -> list["PIL.Image.Image"]:
    """Return the photos that come inside scikit-learn, china.jpg and flower.jpg; nothing is downloaded."""
    require("sklearn", "PIL", needed_by="the photos of scikit-learn")
    import PIL.Image

    # Its files alone: to import it takes longer than a layer's forward pass in both frameworks.
    package = find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).parent / "datasets" / "images"
    return [PIL.Image.open(folder / name).convert("RGB") for name in PHOTOS]


def load_photo() -> np.ndarray:
    """Return (224, 224, 3) bytes: the middle of china.jpg."""
    photo = np.asarray(load_photos()[0])
    top, left = ((size - SIZE) // 2 for size in photo.shape[:2])
    return photo[top : top + SIZE, left : left + SIZE]


def photo_map(photo: np.ndarray, dim: int, seed: int) -> np.ndarray:
    """Cut a photo into patches of 8x8 pixels, the channels of a map.

    Args:
        photo: (224, 224, 3).
        dim: C. The patches have 192 numbers (row, column, colour); any other C is made of them by a random linear map.
        seed: of that map.

    Returns:
        (1, 28, 28, C) in float64; the photo has mean 0 and standard deviation 1.
    """
    pixels = photo.astype(np.float64)
    pixels = (pixels - pixels.mean()) / pixels.std()
    side = SIZE // PATCH
    patches = pixels.reshape(side, PATCH, side, PATCH, 3).swapaxes(1, 2).reshape(1, side, side, CHANNELS)
    if dim == CHANNELS:
        return patches
    return patches @ np.random.default_rng(seed).normal(0.0, CHANNELS**-0.5, (CHANNELS, dim))
