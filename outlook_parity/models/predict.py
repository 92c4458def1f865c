"""What the twins see in images: the most probable classes, and whether they agree."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from outlook_common.imagenet import class_name
from outlook_common.pretrained import Pretrained

Forward = Callable[[np.ndarray], np.ndarray]

# Two labels are tied if, in both twins, their logits differ by less than this share of the largest. In float32 the
# twins' logits differ by some 1e-6 of it.
TIE = 1e-4


@dataclass(frozen=True)
class Guess:
    """One of the most probable classes."""

    index: int
    label: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What the frameworks see in one image, the most probable first; `agree` is None for one framework alone."""

    path: str
    guesses: dict[str, tuple[Guess, ...]]
    agree: bool | None


def _torch_forward(pretrained: Pretrained) -> Forward:
    import torch

    from outlook_torch.pretrained import build

    model = build(pretrained)

    def forward(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()

    return forward


def _jax_forward(pretrained: Pretrained) -> Forward:
    from flax import nnx

    from outlook_jax.pretrained import build

    # As exact as PyTorch's on the CPU, on every device.
    model = build(pretrained, precision="highest")
    run = nnx.jit(lambda model, images: model(images))
    rows = 0

    def forward(images: np.ndarray) -> np.ndarray:
        nonlocal rows
        rows = max(rows, len(images))  # the last batch is smaller; filled up, it is not compiled anew
        filled = np.zeros((rows, *images.shape[1:]), images.dtype)
        filled[: len(images)] = images
        return np.asarray(run(model, filled))[: len(images)]

    return forward


FORWARDS: dict[str, Callable[[Pretrained], Forward]] = {"torch": _torch_forward, "jax": _jax_forward}


def predict_batch(
    batch: Sequence[tuple[Path, np.ndarray]], forwards: Mapping[str, Forward], num_classes: int, top: int
) -> list[Prediction]:
    """Return what each framework sees in each image.

    Args:
        batch: (path, image as the model wants it).
        forwards: by framework, from a batch of images (B, H, W, C) to logits.
        num_classes: of the model.
        top: how many classes to keep.

    Raises:
        ValueError: logits are not finite.
    """
    images = np.stack([image for _, image in batch])
    logits = {name: forward(images) for name, forward in forwards.items()}
    for name, found in logits.items():
        if not np.isfinite(found).all():
            raise ValueError(f"the logits of {name} are not finite: the weights or the images are broken")
    return [
        Prediction(
            str(path),
            {name: guess(found[place], num_classes, top) for name, found in logits.items()},
            agree(*(found[place] for found in logits.values())) if len(logits) > 1 else None,
        )
        for place, (path, _) in enumerate(batch)
    ]


def guess(logits: np.ndarray, num_classes: int, top: int) -> tuple[Guess, ...]:
    """Return the `top` most probable classes, the most probable first; of equal ones, the first in order."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max())
    probabilities = exponentials / exponentials.sum()
    order = np.argsort(-probabilities, kind="stable")[:top]
    return tuple(Guess(int(index), class_name(int(index), num_classes), float(probabilities[index])) for index in order)


def agree(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two twins' logits have the same first label, or two that are tied in both."""
    first, second = int(a.argmax()), int(b.argmax())
    return all(abs(logits[first] - logits[second]) <= TIE * np.abs(logits).max() for logits in (a, b))
