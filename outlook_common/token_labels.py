"""Targets of token labelling from label maps, in step with the crops, flips and warps of the images.

A label map holds, for each cell of a coarse grid over an image, the k best classes of an annotator ("All Tokens
Matter", Jiang et al., 2021, section 3.2; the released maps of ImageNet are 18×18 cells with k = 5): an array
(2, k, rows, columns), scores first, then classes. Targets are what `TokenLabelGTCrossEntropy` of either twin takes.

Letters: X classes, T tokens. `as_published=True` repeats three quirks of `tlt` 0.2.0 (zihangJiang/TokenLabeling), with
which VOLO's released weights were trained: it crops rows by the columns of the box and columns by its rows, its smooth
labels of tokens add up to 1 + smoothing / X, and it warps by the indices of cells instead of their centres.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Integer, Num

__all__ = [
    "affine_label_map",
    "flip_label_map",
    "rotation",
    "shear",
    "token_targets",
    "translation",
]

# (a, b, c, d, e, f): the pixel (x, y) shows what was at (a x + b y + c, d x + e y + f), as Pillow's Image.AFFINE.
Matrix = tuple[float, float, float, float, float, float]


def token_targets(
    label_maps: Num[np.ndarray, "B 2 k rows columns"],
    boxes: Float[np.ndarray, "B 4"],
    labels: Integer[np.ndarray, " B"],
    *,
    num_classes: int,
    token_map: int | tuple[int, int] | None,
    smoothing: float = 0.0,
    as_published: bool = False,
) -> Float[np.ndarray, "B X roles"]:
    """Return targets (B, X, 2 + T), float32: ground truth, label of the class token, labels of the tokens.

    The map is cropped to the box of the image's crop and averaged over each token's cell (RoIAlign), with a softmax
    over the classes after it, of which those that no map names have the score 0.

    Args:
        label_maps: of whole images, flipped and warped as these were.
        boxes: (top, left, bottom, right) of the crops, as shares of the height and width of the images.
        labels: class of each image.
        num_classes: X.
        token_map: rows and columns of the model's tokens (`config.token_map`); None leaves the tokens' labels out.
        smoothing: of labels; the class in question has 1 - smoothing + smoothing / X.
        as_published: with the quirks of `tlt`.

    Raises:
        ValueError: a class, a box or the smoothing is out of range.
    """
    _check_targets(label_maps, boxes, labels, num_classes, smoothing)
    if as_published:
        boxes = boxes[:, [1, 0, 3, 2]]
    scores = _dense(label_maps, num_classes)
    sizes = [(1, 1)] if token_map is None else [(1, 1), _pair(token_map)]
    found = np.concatenate([_softmax(_crop(scores, boxes, size)) for size in sizes], axis=-1)
    truth = np.eye(num_classes, dtype=np.float32)[labels]
    on, off = 1 - smoothing, smoothing / num_classes
    targets = np.concatenate([truth[..., None] * on, found * (on + off if as_published else on)], axis=-1) + off
    return targets.astype(np.float32)


def flip_label_map(
    label_map: Num[np.ndarray, "2 k rows columns"], *, horizontally: bool = False, vertically: bool = False
) -> Num[np.ndarray, "2 k rows columns"]:
    """Return the map of an image that was flipped."""
    return label_map[..., :: -1 if vertically else 1, :: -1 if horizontally else 1]


def affine_label_map(
    label_map: Num[np.ndarray, "2 k rows columns"], matrix: Matrix, *, as_published: bool = False
) -> Num[np.ndarray, "2 k rows columns"]:
    """Return the map of an image that was warped; cells from outside keep the nearest classes with the score 0.

    Args:
        label_map: of the image before it.
        matrix: as for Pillow's `Image.transform`, with lengths in cells: see `shear`, `translation`, `rotation`.
        as_published: count from the centre of the first cell, as `tlt` does, not from the map's corner.
    """
    size = label_map.shape[-2:]
    centre = 0.0 if as_published else 0.5
    y, x = (index + centre for index in np.indices(size))
    a, b, c, d, e, f = matrix
    sources = (d * x + e * y + f - centre, a * x + b * y + c - centre)
    inside = np.logical_and.reduce([(s >= 0) & (s <= n - 1) for s, n in zip(sources, size, strict=True)])
    if not as_published:  # a cell reaches half its size beyond its centre
        inside = np.logical_and.reduce([(s >= -0.5) & (s < n - 0.5) for s, n in zip(sources, size, strict=True)])
    rows, columns = (np.floor(np.clip(s, 0, n - 1) + 0.5).astype(int) for s, n in zip(sources, size, strict=True))
    scores, classes = label_map[..., rows, columns]
    return np.stack([np.where(inside, scores, 0).astype(scores.dtype), classes])


def shear(x: float = 0.0, y: float = 0.0) -> Matrix:
    """Return the matrix of RandAugment's ShearX and ShearY."""
    return (1, x, 0, y, 1, 0)


def translation(size: tuple[int, int], x: float = 0.0, y: float = 0.0) -> Matrix:
    """Return the matrix of RandAugment's TranslateXRel and TranslateYRel, by shares of a (rows, columns) map."""
    return (1, 0, x * size[1], 0, 1, y * size[0])


def rotation(size: tuple[int, int], degrees: float) -> Matrix:
    """Return the matrix of a rotation about the centre of a (rows, columns) map, as Pillow's `Image.rotate`."""
    (rows, columns), angle = size, -math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = columns / 2, rows / 2
    return (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)


def _dense(label_maps: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the scores of all classes, (B, X, rows, columns); the last of equal classes counts."""
    B, _, k, rows, columns = label_maps.shape
    scores = np.zeros((B, num_classes, rows, columns), np.float32)
    image, row, column = np.ogrid[:B, :rows, :columns]
    for best in range(k):
        scores[image, label_maps[:, 1, best].astype(int), row, column] = label_maps[:, 0, best]
    return scores


def _crop(scores: np.ndarray, boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the mean score in each token's cell of the box, (B, X, T): RoIAlign, which falls apart by axes."""
    tokens = []
    for image, (top, left, bottom, right) in zip(scores, boxes, strict=True):
        down = _bins(top, bottom, image.shape[1], size[0])
        across = _bins(left, right, image.shape[2], size[1])
        tokens.append(np.einsum("th,xhw,sw->xts", down, image, across, optimize=True).reshape(image.shape[0], -1))
    return np.stack(tokens)


def _bins(low: float, high: float, cells: int, bins: int) -> np.ndarray:
    """Return the weight of each cell in the mean of each bin of an axis, (bins, cells).

    As torchvision's `roi_align` without `aligned` on coordinates half a cell lower, as `tlt` calls it: a box is at
    least a cell long, and each bin averages samples no further apart than a cell, interpolated between centres.
    """
    start = low * cells - 0.5
    length = max((high - low) * cells, 1.0)
    samples = math.ceil(length / bins)
    at = start + length / bins * (np.arange(bins)[:, None] + (np.arange(samples) + 0.5) / samples)
    counted = (at >= -1) & (at <= cells)
    at = np.clip(at, 0, cells - 1)
    below = np.floor(at).astype(int)
    share = at - below
    weights = np.zeros((bins, cells))
    bin_ = np.broadcast_to(np.arange(bins)[:, None], at.shape)
    np.add.at(weights, (bin_, below), (1 - share) * counted)
    np.add.at(weights, (bin_, np.minimum(below + 1, cells - 1)), share * counted)
    return weights / samples


def _softmax(scores: np.ndarray) -> np.ndarray:
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))


def _pair(token_map: int | tuple[int, int]) -> tuple[int, int]:
    return (token_map, token_map) if isinstance(token_map, int) else token_map


def _check_targets(
    label_maps: np.ndarray, boxes: np.ndarray, labels: np.ndarray, num_classes: int, smoothing: float
) -> None:
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must lie in [0, 1), got {smoothing}")
    named: Sequence[tuple[str, np.ndarray]] = (("labels", labels), ("classes of the label maps", label_maps[:, 1]))
    for name, classes in named:
        if classes.size and not (classes.min() >= 0 and classes.max() < num_classes):
            numbers = f"{classes.min():g} to {classes.max():g}"
            raise ValueError(f"{name} must lie in [0, {num_classes}), got {numbers}; num_classes={num_classes}")
    top, left, bottom, right = boxes.T
    wrong = ~((top >= 0) & (left >= 0) & (top < bottom) & (left < right) & (bottom <= 1 + 1e-6) & (right <= 1 + 1e-6))
    if wrong.any():
        index = int(wrong.argmax())
        raise ValueError(
            f"box {index} is {tuple(map(float, boxes[index]))}; expected 0 <= top < bottom <= 1 and "
            "0 <= left < right <= 1, shares of the image"
        )
