"""Images and token labels of the recipe: sources, VOLO's augmentation, and batches by position.

What a sample is follows from (seed, epoch, index) alone, so that both scripts see the same data, and a training that
goes on needs to know its step and nothing else.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from examples.imagenet.recipe import Recipe
from outlook_common.config import IMAGENET_MEAN, IMAGENET_STD
from outlook_common.images import Preprocessing, load_image, preprocess
from outlook_common.mixing import cutmix_box
from outlook_common.token_labels import affine_label_map, flip_label_map, rotation, shear, token_targets, translation

MEAN, STD = np.array(IMAGENET_MEAN, np.float32), np.array(IMAGENET_STD, np.float32)
FILL = tuple(round(255 * x) for x in MEAN)
RESAMPLINGS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)

LabelMap = np.ndarray


class Sample(NamedTuple):
    """An image (H, W, 3), normalised, and its target (X, 2 + T)."""

    image: np.ndarray
    target: np.ndarray


class Source(Protocol):
    """Images by index with their classes, and a label map each, or None."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Image.Image, int, LabelMap | None]: ...


class Folder:
    """`<root>/<class>/<image>`, and `<label_maps>/<class>/<image>.npy`."""

    def __init__(self, root: Path, label_maps: Path | None) -> None:
        classes = sorted(path.name for path in root.iterdir() if path.is_dir())
        self.files = [(path, label) for label, name in enumerate(classes) for path in sorted((root / name).iterdir())]
        self.label_maps = label_maps

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int, LabelMap | None]:
        path, label = self.files[index]
        maps = self.label_maps
        return load_image(path), label, None if maps is None else np.load(maps / path.parent.name / f"{path.stem}.npy")


class Digits:
    """scikit-learn's digits, upscaled 4x4; the label map says the digit where there is ink."""

    def __init__(self, *, held_out: bool) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, labels = load_digits(return_X_y=True)
        parts = train_test_split(images.reshape(-1, 8, 8), labels, test_size=0.25, random_state=0, stratify=labels)
        self.images, self.labels = parts[held_out], parts[2 + held_out]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int, LabelMap | None]:
        ink, label = self.images[index], int(self.labels[index])
        pixels = np.kron(ink, np.ones((4, 4))) * 255 / 16
        return (
            Image.fromarray(pixels.astype(np.uint8)).convert("RGB"),
            label,
            np.stack([ink / 2, np.full_like(ink, label)])[:, None].astype(np.float32),
        )


def sources(recipe: Recipe) -> tuple[Source, Source]:
    """Return what is trained on and what is held out."""
    root, maps = recipe.data.root, recipe.data.label_maps
    if root == "digits":
        return Digits(held_out=False), Digits(held_out=True)
    return Folder(Path(root, "train"), Path(maps) if maps else None), Folder(Path(root, "val"), None)


class TrainingData:
    """Every sample of a whole training by position, augmented: position // len(source) is its epoch.

    An epoch has whole batches only, of a new permutation each.
    """

    def __init__(self, source: Source, recipe: Recipe) -> None:
        self.source, self.recipe = source, recipe
        self.steps_per_epoch = len(source) // recipe.training.batch
        if not self.steps_per_epoch:
            raise ValueError(f"a batch of {recipe.training.batch} is larger than the {len(source)} images")
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, int))

    def __len__(self) -> int:
        return self.recipe.training.epochs * self.steps_per_epoch * self.recipe.training.batch

    def __getitem__(self, position: int) -> Sample:
        seed, per_epoch = self.recipe.training.seed, self.steps_per_epoch * self.recipe.training.batch
        epoch, place = divmod(int(position), per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng((seed, epoch)).permutation(len(self.source))
        index = int(self._order[1][place])
        return augment(*self.source[index], self.recipe, np.random.default_rng((seed, epoch, index)))


class LocalData:
    """The samples of one of several processes, from a step on: its part of every batch."""

    def __init__(self, data: TrainingData, step: int, process: int, processes: int) -> None:
        batch = data.recipe.training.batch
        if batch % processes:
            raise ValueError(f"a batch of {batch} does not divide by {processes} processes")
        self.data, self.batch, self.local = data, batch, batch // processes
        self.start = step * batch + process * self.local

    def __len__(self) -> int:
        return (len(self.data) - self.start + self.batch - 1) // self.batch * self.local

    def __getitem__(self, index: int) -> Sample:
        step, place = divmod(int(index), self.local)
        return self.data[self.start + step * self.batch + place]


def held_out(source: Source, index: int, recipe: Recipe) -> tuple[np.ndarray, int]:
    """Return a held-out image as a model takes it, and its class."""
    image, label, _ = source[index]
    return preprocess(image, Preprocessing(recipe.model.img_size, 0.96)), label


def mix_box(recipe: Recipe, step: int) -> tuple[int, int, int, int]:
    """Return a step's box of token mixing (y1, x1, y2, x2), drawn as VOLO draws it: CutMix's, with share beta(1, 1)."""
    rng = np.random.default_rng((recipe.training.seed, 1, step))
    return cutmix_box(recipe.model.token_map, rng.beta(1, 1), rng)


def augment(
    image: Image.Image, label: int, label_map: LabelMap | None, recipe: Recipe, rng: np.random.Generator
) -> Sample:
    """Return an augmented sample: flip, RandAugment, random crop, random erasing, the label map in step."""
    how, size = recipe.data, recipe.model.img_size
    if rng.random() < how.hflip:
        image = ImageOps.mirror(image)
        label_map = label_map if label_map is None else flip_label_map(label_map, horizontally=True)
    for name in rng.choice(list(OPERATIONS), how.randaugment):
        if rng.random() < 0.5:
            level = float(np.clip(rng.normal(how.magnitude, how.magnitude_std), 0, 10)) / 10
            image, label_map = OPERATIONS[name](image, label_map, level, 1 if rng.random() < 0.5 else -1, rng)
    crop = _random_crop(image.size, how.scale, how.ratio, rng)
    box = np.array(crop)[[1, 0, 3, 2]] / np.array((image.height, image.width) * 2)  # in shares, rows before columns
    image = image.resize(size[::-1], RESAMPLINGS[rng.integers(2)], box=crop)
    pixels = (np.asarray(image, np.float32) / 255 - MEAN) / STD
    if rng.random() < how.erasing:
        _erase(pixels, rng)
    return Sample(pixels, _target(label, label_map, box, recipe))


def _target(label: int, label_map: LabelMap | None, box: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Return a sample's target (X, 2 + T), or (X,) where there are no token labels."""
    classes, smoothing = recipe.model.num_classes, recipe.data.smoothing
    if label_map is None:
        return ((1 - smoothing) * np.eye(classes)[label] + smoothing / classes).astype(np.float32)
    return token_targets(
        label_map[None],
        box[None],
        np.array([label]),
        num_classes=classes,
        token_map=recipe.model.token_map,
        smoothing=smoothing,
        as_published=recipe.data.as_published,
    )[0]


def _random_crop(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of a crop of random area and shape, as torchvision's RandomResizedCrop."""
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        shape = math.exp(rng.uniform(*np.log(ratio)))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    # An image of extreme shape: the largest crop of the nearest shape allowed, from its middle.
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    return (width - w) // 2, (height - h) // 2, (width - w) // 2 + w, (height - h) // 2 + h


def _erase(pixels: np.ndarray, rng: np.random.Generator) -> None:
    """Fill a random rectangle with noise, in place, as timm's RandomErasing in mode "pixel"."""
    height, width = pixels.shape[:2]
    for _ in range(10):
        area = rng.uniform(0.02, 1 / 3) * height * width
        shape = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if h < height and w < width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            pixels[top : top + h, left : left + w] = rng.standard_normal((h, w, pixels.shape[2]))
            return


Operation = Callable[
    [Image.Image, LabelMap | None, float, int, np.random.Generator], tuple[Image.Image, LabelMap | None]
]


def _colour(change: Callable[[Image.Image, float, int], Image.Image]) -> Operation:
    """Return an operation that leaves the label map as it is."""
    return lambda image, label_map, level, sign, rng: (change(image, level, sign), label_map)


def _enhance(enhancer: type) -> Operation:
    """Return an operation whose strength grows with the level, up or down."""
    return _colour(lambda image, level, sign: enhancer(image).enhance(1 + sign * 0.9 * level))


def _warp(matrix: Callable[[tuple[int, int], float], tuple[float, ...]]) -> Operation:
    """Return an operation on image and label map, each by the matrix for its own (rows, columns)."""

    def apply(
        image: Image.Image, label_map: LabelMap | None, level: float, sign: int, rng: np.random.Generator
    ) -> tuple[Image.Image, LabelMap | None]:
        of_image = matrix((image.height, image.width), sign * level)
        warped = image.transform(
            image.size, Image.Transform.AFFINE, of_image, RESAMPLINGS[rng.integers(2)], fillcolor=FILL
        )
        if label_map is not None:
            label_map = affine_label_map(label_map, matrix(label_map.shape[-2:], sign * level))
        return warped, label_map

    return apply


def _solarize_add(image: Image.Image, level: float, sign: int) -> Image.Image:
    return image.point([min(255, i + int(level * 110)) if i < 128 else i for i in range(256)] * len(image.getbands()))


# RandAugment's operations ("rand-m9-mstd0.5-inc1" of timm); a level lies in [0, 1].
OPERATIONS: dict[str, Operation] = {
    "AutoContrast": _colour(lambda image, level, sign: ImageOps.autocontrast(image)),
    "Equalize": _colour(lambda image, level, sign: ImageOps.equalize(image)),
    "Invert": _colour(lambda image, level, sign: ImageOps.invert(image)),
    "Rotate": _warp(lambda size, level: rotation(size, 30 * level)),
    "Posterize": _colour(lambda image, level, sign: ImageOps.posterize(image, max(4 - int(4 * level), 1))),
    "Solarize": _colour(lambda image, level, sign: ImageOps.solarize(image, 256 - int(256 * level))),
    "SolarizeAdd": _colour(_solarize_add),
    "Color": _enhance(ImageEnhance.Color),
    "Contrast": _enhance(ImageEnhance.Contrast),
    "Brightness": _enhance(ImageEnhance.Brightness),
    "Sharpness": _enhance(ImageEnhance.Sharpness),
    "ShearX": _warp(lambda size, level: shear(x=0.3 * level)),
    "ShearY": _warp(lambda size, level: shear(y=0.3 * level)),
    "TranslateX": _warp(lambda size, level: translation(size, x=0.45 * level)),
    "TranslateY": _warp(lambda size, level: translation(size, y=0.45 * level)),
}
