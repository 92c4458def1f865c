"""What each type of model is asked: how it takes its input, and what its training steps minimise. No framework here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from outlook_common.config import OutlookAttentionConfig, VOLOConfig
from outlook_common.volo import MixBox
from outlook_parity.core.pytree import named_leaves

Shape = tuple[int, ...]

OUTPUT = "output"


@dataclass(frozen=True)
class Task:
    """What training steps minimise.

    Attributes:
        targets: in float64, by the name of the output that they are for.
        loss: of (model, inputs, targets, losses), in either framework; `losses` is the twin's module of that name.
    """

    targets: Mapping[str, np.ndarray]
    loss: Callable[[Any, Sequence[Any], Mapping[str, Any], Any], Any]


@dataclass(frozen=True)
class Subject:
    """How a type of model is verified.

    Attributes:
        torch_axes: the axes of the input, which has its channels last, in the order that the PyTorch twin takes them.
        task: from the configuration, the shape of the input and a generator.
    """

    torch_axes: Shape
    task: Callable[[Any, Shape, np.random.Generator], Task]


def subject_of(config: Any) -> Subject | None:
    """Return how a model of this configuration is verified, None if it is not one of this package."""
    return next((subject for known, subject in SUBJECTS.items() if isinstance(config, known)), None)


def mix_box(token_map: tuple[int, int]) -> MixBox:
    """Return a fixed box (y1, x1, y2, x2), off the centre and of unequal sides, as far as the map has room for it."""
    H, W = token_map
    y1, x1 = H // 5, W // 3
    return y1, x1, max(y1 + 1, H * 3 // 5), max(x1 + 1, W * 6 // 7)


def _mean_square_of_a_map(config: OutlookAttentionConfig, shape: Shape, rng: np.random.Generator) -> Task:
    return mean_square({OUTPUT: rng.standard_normal(shape)})


def _token_labelling(config: VOLOConfig, shape: Shape, rng: np.random.Generator) -> Task:
    """Return the loss that VOLO is trained with, on mixed tokens; without auxiliary head the mean square."""
    H, W = shape[1] // config.stride, shape[2] // config.stride
    if not (config.use_aux_head and config.num_classes > 0):
        tokens = (H * W + (config.post_layers is not None),) if config.global_pool == "" else ()
        logits = (shape[0], *tokens, config.num_classes or config.num_features)
        return mean_square({OUTPUT: rng.standard_normal(logits)})
    scores = np.exp(2 * rng.standard_normal((shape[0], config.num_classes, 2 + H * W)))

    def loss(model: Any, inputs: Sequence[Any], targets: Mapping[str, Any], losses: Any) -> Any:
        trained = model.forward_train(inputs[0], mix_box((H, W)))
        return losses.TokenLabelCrossEntropy()(trained, targets[OUTPUT])

    return Task({OUTPUT: scores / scores.sum(axis=1, keepdims=True)}, loss)


def mean_square(targets: Mapping[str, np.ndarray]) -> Task:
    """Return the sum over the outputs of the mean square of the difference from their target."""

    def loss(model: Any, inputs: Sequence[Any], targets: Mapping[str, Any], losses: Any) -> Any:
        outputs = named_leaves(model(*inputs), is_array, OUTPUT)
        return sum(((outputs[name] - target) ** 2).mean() for name, target in targets.items())

    return Task(targets, loss)


def no_task(request: object) -> Task:
    """Raise an AssertionError: for a twin that is not trained."""
    raise AssertionError("nothing is trained here")


def is_array(leaf: Any) -> bool:
    """Whether something is an array of either framework, or a number."""
    return (hasattr(leaf, "shape") and hasattr(leaf, "dtype")) or isinstance(leaf, int | float)


SUBJECTS: dict[type, Subject] = {
    OutlookAttentionConfig: Subject((0, 1, 2, 3), _mean_square_of_a_map),
    VOLOConfig: Subject((0, 3, 1, 2), _token_labelling),
}
