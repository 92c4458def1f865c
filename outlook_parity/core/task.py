"""What training steps minimise. Imports no framework."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from outlook_parity.core.calls import Arguments, called
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
    loss: Callable[[Any, Any, Mapping[str, Any], Any], Any]


class NamedOutputs(dict[str, Any]):
    """Outputs by the names that they have in the report."""


# What follows the name of an output in the name of its mask among the targets.
MASK = " mask"


def mean_square(targets: Mapping[str, np.ndarray]) -> Task:
    """Return the sum over the outputs of the mean square of the difference from their target."""

    def loss(model: Any, inputs: Arguments, targets: Mapping[str, Any], losses: Any) -> Any:
        result = called(model, inputs)
        outputs = result if isinstance(result, NamedOutputs) else named_leaves(result, is_array, OUTPUT)
        return sum(
            ((outputs[name] - target) ** 2 * targets.get(f"{name}{MASK}", 1.0)).mean()
            for name, target in targets.items()
            if not name.endswith(MASK)
        )

    return Task(targets, loss)


def no_task(request: object) -> Task:
    """Raise an AssertionError: for a twin that is not trained."""
    raise AssertionError("nothing is trained here")


def is_array(leaf: Any) -> bool:
    """Whether something is an array of either framework, or a number."""
    return (hasattr(leaf, "shape") and hasattr(leaf, "dtype")) or isinstance(leaf, int | float)
