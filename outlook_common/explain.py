"""What the attention weights of a VOLO say about one place of an image."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from outlook_common.config import VOLOConfig
from outlook_common.geometry import WindowGrid, window_grid

NO_ATTENTION = "{} contains no attention layer of this package: nothing to look at"


@dataclass(frozen=True)
class PlaceWeights:
    """What one place mixes in one block.

    Attributes:
        path: of the layer.
        kind: "outlook", a place of the map and its neighbourhood; "class", the class token and all tokens.
        weights: (H, W), mean over the heads, of each place of the map. They sum to one with `rest`.
        rest: what falls on places outside the map, whose values are zero; or on the class token itself.
    """

    path: str
    kind: Literal["outlook", "class"]
    weights: Float[np.ndarray, "H W"]
    rest: float


def place_weights(
    maps: Mapping[str, Float[np.ndarray, "..."]],
    config: VOLOConfig,
    image_size: tuple[int, int],
    place: tuple[int, int],
) -> list[PlaceWeights]:
    """Return what a place mixes in each outlooker, and the class token in each class block.

    Args:
        maps: what `attention_maps` gives for one image, without the batch axis.
        config: of the model.
        image_size: (rows, columns) in pixels of the model's input.
        place: (row, column) in pixels of it.

    Raises:
        ValueError: the place lies outside the image.
    """
    if not all(0 <= at < size for at, size in zip(place, image_size, strict=True)):
        raise ValueError(
            f"place {place[0]},{place[1]} lies outside the image of {image_size[0]}x{image_size[1]} pixels"
        )
    reductions = {feature["module"]: feature["reduction"] for feature in config.feature_info}
    found = []
    for path, weights in maps.items():
        module, number, *_ = path.split(".")
        if module == "post_network":
            mean = weights.mean(axis=0)[0]
            size = tuple(side // config.stride for side in image_size)
            found.append(PlaceWeights(path, "class", mean[1:].reshape(size), float(mean[0])))
        elif config.network[int(number)].kind == "outlooker":
            reduction = reductions[f"{module}.{number}"]
            rows, columns = (side // reduction for side in image_size)
            grid = window_grid((rows, columns), config.out_kernel, config.out_stride, config.out_padding)
            mean = mixed_at(weights, grid, (place[0] // reduction, place[1] // reduction)).mean(axis=0)
            found.append(PlaceWeights(path, "outlook", mean, float(1 - mean.sum())))
    return found


def mixed_at(
    weights: Float[np.ndarray, "h w N KK KK"], grid: WindowGrid, place: tuple[int, int]
) -> Float[np.ndarray, "N H W"]:
    """Return the weights by which outlook attention mixes the map's values into one place: the mean over its windows.

    Args:
        weights: of every window, softmaxed.
        grid: the windows.
        place: (row, column) of the map.
    """
    heads, (top, left), (rows, columns) = weights.shape[2], grid.padding, grid.kernel_size
    around = np.zeros((heads, *grid.padded_size))
    windows = 0
    for i, j in np.ndindex(*grid.grid):
        y, x = place[0] + top - i * grid.stride[0], place[1] + left - j * grid.stride[1]
        if 0 <= y < rows and 0 <= x < columns:
            row = weights[i, j, :, y * columns + x].reshape(heads, rows, columns)
            first, second = i * grid.stride[0], j * grid.stride[1]
            around[:, first : first + rows, second : second + columns] += row
            windows += 1
    return around[:, top : top + grid.map_size[0], left : left + grid.map_size[1]] / max(windows, 1)
