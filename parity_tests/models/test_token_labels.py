"""Token labels: the published builder's numbers, and labels that stay in step with the images."""

import importlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from outlook_common.mixing import cutmix, mixup
from outlook_common.token_labels import (
    affine_label_map,
    flip_label_map,
    rotation,
    shear,
    token_targets,
    translation,
)

B, K, SIZE, X, TOKENS = 5, 3, 6, 9, 4
WARPS = {
    "shear x": shear(x=0.3),
    "shear y": shear(y=-0.25),
    "translate x": translation((SIZE, SIZE), x=0.3),
    "translate y": translation((SIZE, SIZE), y=-0.4),
    "rotate": rotation((SIZE, SIZE), 30),
    "rotate back": rotation((SIZE, SIZE), -17),
}


def draw_label_maps(rng: np.random.Generator) -> np.ndarray:
    """Scores of three different classes per cell."""
    classes = rng.permuted(np.tile(np.arange(X)[:, None, None], (B, 1, SIZE, SIZE)), axis=1)[:, :K]
    return np.stack([rng.standard_normal(classes.shape) ** 2, classes], axis=1).astype(np.float32)


def draw_boxes(rng: np.random.Generator) -> np.ndarray:
    corner = rng.random((B, 2)) / 2
    return np.concatenate([corner, corner + 0.05 + 0.45 * rng.random((B, 2))], axis=1)


def published_targets(maps: np.ndarray, boxes: np.ndarray, labels: np.ndarray, smoothing: float) -> np.ndarray:
    """Return what `tlt` 0.2.0's `mixup_target` does, step by step, with torchvision's RoIAlign in Python."""
    # The function within, as it is written: torchvision would compile it.
    roi_align = importlib.import_module("torchvision.ops.roi_align")._roi_align.__wrapped__
    dense = torch.zeros(B, X, SIZE, SIZE, dtype=torch.float64)
    for one, label_map in zip(dense, torch.from_numpy(maps), strict=True):
        one.scatter_(0, label_map[1].long(), label_map[0].double())
    rois = torch.cat([torch.arange(B)[:, None], torch.from_numpy(boxes) * SIZE - 0.5], dim=1)
    whole, tokens = (roi_align(dense, rois, 1.0, n, n, -1, False).flatten(2) for n in (1, TOKENS))
    off = smoothing / X
    on = 1 - smoothing + off
    truth = torch.full((B, X), off, dtype=torch.float64).scatter_(1, torch.from_numpy(labels)[:, None], on)
    label = torch.cat([whole, tokens], dim=2).softmax(dim=1) * on + off
    return torch.cat([truth[..., None], label], dim=2).numpy()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("seed", range(3))
def test_targets_are_those_of_the_published_builder(seed: int, smoothing: float) -> None:
    rng = np.random.default_rng(seed)
    maps, boxes, labels = draw_label_maps(rng), draw_boxes(rng), rng.integers(X, size=B)
    known = {"num_classes": X, "smoothing": smoothing, "as_published": True}
    expected = published_targets(maps, boxes, labels, smoothing)
    np.testing.assert_allclose(token_targets(maps, boxes, labels, token_map=TOKENS, **known), expected, atol=1e-7)
    whole = token_targets(maps, boxes, labels, token_map=None, **known)
    np.testing.assert_allclose(whole, expected[:, :, :2], atol=1e-7)


def test_tokens_have_the_labels_of_their_part_of_the_crop_and_every_label_adds_up_to_one() -> None:
    classes = np.arange(16).reshape(1, 1, 4, 4)
    maps = np.stack([np.full((1, 1, 4, 4), 50.0), classes], axis=1)
    options = {"num_classes": 16, "token_map": 2}
    # The upper right quarter: rows 0 and 1, columns 2 and 3.
    targets = token_targets(maps, np.array([[0, 0.5, 0.5, 1]]), np.array([7]), smoothing=0.1, **options)
    np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-6)
    assert targets[0, :, 0].argmax() == 7
    assert targets[0, :, 2:].argmax(axis=0).tolist() == [2, 3, 6, 7]
    published = token_targets(maps, np.array([[0, 0.5, 0.5, 1]]), np.array([7]), as_published=True, **options)
    assert published[0, :, 2:].argmax(axis=0).tolist() == [8, 9, 12, 13]


@pytest.mark.parametrize("warp", WARPS)
def test_warps_are_those_of_the_published_label_maps(warp: str) -> None:
    label_map = draw_label_maps(np.random.default_rng(0))[0]
    a, b, c, d, e, f = WARPS[warp]
    matrix = [[1, 0, 0, 0], [0, e, d, f], [0, b, a, c]]  # rows before columns
    expected = [
        ndimage.affine_transform(plane, matrix, order=0, mode=mode)
        for plane, mode in zip(label_map, ("constant", "nearest"), strict=True)
    ]
    np.testing.assert_array_equal(affine_label_map(label_map, WARPS[warp], as_published=True), expected)


@pytest.mark.parametrize("warp", WARPS)
def test_maps_are_warped_as_pillow_warps_images(warp: str) -> None:
    image = np.random.default_rng(0).integers(1, 200, (SIZE, SIZE)).astype(np.uint8)
    expected = Image.fromarray(image).transform((SIZE, SIZE), Image.Transform.AFFINE, WARPS[warp])
    found = affine_label_map(np.stack([image[None], image[None]]).astype(np.float32), WARPS[warp])
    np.testing.assert_array_equal(found[0, 0], np.asarray(expected))
    if warp == "rotate":
        np.testing.assert_array_equal(found[0, 0], np.asarray(Image.fromarray(image).rotate(30)))


def test_flips_are_those_of_the_image() -> None:
    label_map = draw_label_maps(np.random.default_rng(0))[0]
    np.testing.assert_array_equal(flip_label_map(label_map, horizontally=True), np.flip(label_map, 3))
    np.testing.assert_array_equal(flip_label_map(label_map, vertically=True), np.flip(label_map, 2))


@pytest.mark.parametrize("channels_last", [True, False])
def test_cutmix_pastes_the_share_of_the_reversed_batch_that_the_targets_say(channels_last: bool) -> None:
    rng = np.random.default_rng(0)
    image = np.broadcast_to(np.arange(4.0)[:, None, None, None], (4, 8, 6, 3) if channels_last else (4, 3, 8, 6))
    targets = np.broadcast_to(np.arange(4.0)[:, None, None], (4, 2, 5))
    for _ in range(20):
        mixed, labels = cutmix(image, targets, 0.4, rng, channels_last=channels_last)
        np.testing.assert_allclose(mixed.mean(axis=(1, 2, 3)), labels[:, 0, 0])
        assert 0.4 <= (mixed[0] == 0).mean() < 1
        assert set(np.unique(mixed[0])) == {0, 3}


def test_mixup_is_the_weighted_mean_with_the_reversed_batch() -> None:
    images, targets = np.arange(6.0).reshape(3, 2), np.eye(3)
    mixed, labels = mixup(images, targets, 0.75)
    np.testing.assert_allclose(mixed, [[1, 2], [2, 3], [3, 4]])
    np.testing.assert_allclose(labels, [[0.75, 0, 0.25], [0, 1, 0], [0.25, 0, 0.75]])


WRONG: dict[str, tuple[Callable[[np.ndarray, np.ndarray, np.ndarray], object], str]] = {
    "label": (
        lambda m, b, y: token_targets(m, b, y + X, num_classes=X, token_map=2),
        rf"labels must lie in \[0, {X}\), got",
    ),
    "class of a map": (
        lambda m, b, y: token_targets(m, b, y % 2, num_classes=5, token_map=2),
        r"classes of the label maps must lie in \[0, 5\), got 0 to 8",
    ),
    "box in pixels": (
        lambda m, b, y: token_targets(m, 224 * b, y, num_classes=X, token_map=2),
        "shares of the image",
    ),
    "smoothing": (
        lambda m, b, y: token_targets(m, b, y, num_classes=X, token_map=2, smoothing=1.0),
        r"smoothing must lie in \[0, 1\), got 1",
    ),
    "share": (lambda m, b, y: mixup(b, b, 1.5), r"share must lie in \[0, 1\], got 1.5"),
    "bytes": (lambda m, b, y: mixup(b.astype(np.uint8), b, 0.5), "floating-point images, got uint8"),
    "number of targets": (lambda m, b, y: mixup(b, b[1:], 0.5), "5 images and 4 targets"),
}


@pytest.mark.unchecked
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_out_of_range_is_said_with_numbers(wrong: str) -> None:
    rng = np.random.default_rng(0)
    call, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        call(draw_label_maps(rng), draw_boxes(rng), rng.integers(X, size=B))
