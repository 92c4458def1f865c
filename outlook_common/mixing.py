"""Mix-up and CutMix of a batch with itself in reverse order, images and targets in step.

As timm and `tlt` do in their mode "batch": one share for the whole batch, and every column of a token-labelling target
mixed by it. Token mixing, which VOLO's released recipe uses instead, is part of the models (`use_mix_token`).
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Num

__all__ = ["cutmix", "cutmix_box", "mixup"]


def mixup(
    images: Num[np.ndarray, "B ..."], targets: Float[np.ndarray, "B ..."], share: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return share * batch + (1 - share) * reversed batch, of images and targets (Zhang et al., 2018, section 2).

    Args:
        images: any layout; float, for integers would be cut off.
        targets: of any number of columns.
        share: in [0, 1], drawn as `rng.beta(alpha, alpha)` by custom.

    Raises:
        ValueError: the share is out of range, the images are integers, or there are not as many images as targets.
    """
    _check(images, targets, share)
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"mix-up takes floating-point images, got {images.dtype}; normalise them before")
    return _mean(images, share), _mean(targets, share)


def cutmix(
    images: Num[np.ndarray, "B ..."],
    targets: Float[np.ndarray, "B ..."],
    share: float,
    rng: np.random.Generator,
    *,
    channels_last: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the batch with a box pasted from the reversed batch, and targets mixed by the area (Yun et al., 2019).

    Args:
        images: (B, H, W, C), or (B, C, H, W) unless `channels_last`.
        targets: of any number of columns.
        share: of the area that stays, in [0, 1]; a box that the border cuts off takes less, and the targets with it.
        rng: for the centre of the box.
        channels_last: layout of the images.

    Raises:
        ValueError: the share is out of range, or there are not as many images as targets.
    """
    _check(images, targets, share)
    size = images.shape[1:3] if channels_last else images.shape[2:4]
    top, left, bottom, right = cutmix_box((size[0], size[1]), share, rng)
    box = (slice(top, bottom), slice(left, right))
    where = (slice(None), *box) if channels_last else (slice(None), slice(None), *box)
    mixed = images.copy()
    mixed[where] = images[::-1][where]
    taken = (bottom - top) * (right - left) / (size[0] * size[1])
    return mixed, _mean(targets, 1 - taken)


def cutmix_box(size: tuple[int, int], share: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Return a box (top, left, bottom, right) of 1 - share of a map, around a random centre, cut off at the border."""
    lengths = [int(n * np.sqrt(1 - share)) for n in size]
    centres = [int(rng.integers(n)) for n in size]
    top, left = (max(centre - length // 2, 0) for centre, length in zip(centres, lengths, strict=True))
    bottom, right = (min(c + length // 2, n) for c, length, n in zip(centres, lengths, size, strict=True))
    return top, left, bottom, right


def _mean(batch: np.ndarray, share: float) -> np.ndarray:
    return np.asarray(share * batch + (1 - share) * batch[::-1], batch.dtype)


def _check(images: Any, targets: Any, share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share}")
    if len(images) != len(targets):
        raise ValueError(f"expected a target per image, got {len(images)} images and {len(targets)} targets")
