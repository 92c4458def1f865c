"""A training that goes on later, in either framework: weights, the optimizer's moments, the step.

In a file the weights lie below `model`, each kind of moment below `optimizer`, all under PyTorch's names and in its
layout, whichever twin wrote them; `optimizer.step` counts the steps that were made.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from outlook_common.weights.checkpoint import Checkpoint, open_checkpoint
from outlook_common.weights.errors import WeightsError
from outlook_common.weights.formats.registry import PathLike, write_arrays
from outlook_common.weights.io.lazy import stored
from outlook_common.weights.match import resolve_checkpoint
from outlook_common.weights.tables.base import WeightTable

Arrays = dict[str, np.ndarray]

MODEL, OPTIMIZER, STEP = "model", "optimizer", "step"

# PyTorch's name of each kind of moment -> Optax's, for Adam and AdamW and for SGD with momentum.
MOMENTS = {"exp_avg": "mu", "exp_avg_sq": "nu", "momentum_buffer": "trace"}


@dataclass(frozen=True)
class Training:
    """What is needed to go on with a training.

    Attributes:
        weights: every parameter and buffer, under PyTorch's names and in its layout.
        moments: kind -> likewise for the parameters that are trained; see `MOMENTS`.
        step: how many steps were made.
    """

    weights: Arrays
    moments: Mapping[str, Arrays]
    step: int


def write_training(path: PathLike, training: Training) -> None:
    """Write a training, whole or not at all; the suffix of `path` decides the format.

    Raises:
        WeightsError: the suffix is unknown.
        OSError: the file cannot be written; what stood there is as it was.
    """
    arrays = {f"{MODEL}.{name}": array for name, array in training.weights.items()}
    for kind, moments in training.moments.items():
        arrays |= {f"{OPTIMIZER}.{kind}.{name}": array for name, array in moments.items()}
    arrays[f"{OPTIMIZER}.{STEP}"] = np.array(training.step, np.int64)
    write_arrays(path, arrays, {"format": "pt"})


def read_training(path: PathLike, table: WeightTable, kinds: Iterable[str], parameters: Iterable[str]) -> Training:
    """Return a training for a model and its optimizer.

    Args:
        path: a file that `write_training` wrote.
        table: of the model.
        kinds: of moments that the optimizer has.
        parameters: PyTorch's names of those it trains.

    Raises:
        WeightsError: the file is no training, has other moments than the optimizer, or anything does not fit.
        OSError: the file cannot be opened.
    """
    checkpoint, kinds, trained = open_checkpoint(path), set(kinds), set(parameters)
    optimizer = checkpoint.below(OPTIMIZER)
    step = _step(optimizer)
    found = {name.split(".")[0] for name in optimizer.names} - {STEP}
    if found != kinds:
        has, wants = (", ".join(sorted(names)) or "none" for names in (found, kinds))
        raise WeightsError(f"{checkpoint.label}: it has the moments {has}, the optimizer needs {wants}")
    entries = tuple(entry for entry in table.entries if entry.torch in trained)
    moments_table = WeightTable(f"the optimizer of {table.model}", entries)
    weights = resolve_checkpoint(checkpoint.below(MODEL), table)
    moments = {
        kind: resolve_checkpoint(checkpoint.below(f"{OPTIMIZER}.{kind}"), moments_table) for kind in sorted(kinds)
    }
    return Training(weights, moments, step)


def _step(optimizer: Checkpoint) -> int:
    value = dict(optimizer.items).get(STEP)
    step = None if value is None else stored(value)
    if step is None or step.shape != () or step.dtype.kind not in "iu":
        raise WeightsError(f"{optimizer.label}: no training, it has no count of steps, {OPTIMIZER}.{STEP}")
    return int(step.read())


def refuse_moments(strange: Iterable[object]) -> None:
    """Raise a TypeError if there is anything an optimizer keeps that is not in `MOMENTS`."""
    if names := sorted(set(map(str, strange))):
        known = ", ".join(f"{theirs} ({ours})" for theirs, ours in MOMENTS.items())
        raise TypeError(
            f"the optimizer keeps {', '.join(names)}, of which nothing is known; known: {known}, as Adam, AdamW and "
            "SGD with momentum keep them"
        )
