"""What training steps minimise. Imports no framework."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from outlook_parity.core.pytree import named_leaves

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
