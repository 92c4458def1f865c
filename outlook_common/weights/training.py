"""Training checkpoints for both frameworks: weights, the optimizer's moments, the step.

In a file weights are below `model.`, each kind of moment below `optimizer.<kind>.`, all under PyTorch's names and in
its layout, whichever twin wrote them; `optimizer.step` is the number of steps done.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from outlook_common.weights.checkpoint import Checkpoint, open_checkpoint
from outlook_common.weights.errors import WeightsError
from outlook_common.weights.formats.base import PathLike
from outlook_common.weights.formats.registry import write_arrays
from outlook_common.weights.io.lazy import as_lazy
from outlook_common.weights.match import resolve_checkpoint
from outlook_common.weights.tables.base import WeightTable

Arrays = dict[str, np.ndarray]

MODEL, OPTIMIZER, STEP = "model", "optimizer", "step"

# Kinds of moments, PyTorch's name -> Optax's: Adam and AdamW, and SGD with momentum.
MOMENTS = {"exp_avg": "mu", "exp_avg_sq": "nu", "momentum_buffer": "trace"}


@dataclass(frozen=True)
class Training:
    """State of a training.

    Attributes:
        weights: every parameter and buffer, under PyTorch's names and in its layout.
        moments: kind (see `MOMENTS`) -> arrays of the trained parameters, likewise.
        step: number of steps done.
    """

    weights: Arrays
    moments: Mapping[str, Arrays]
    step: int


def write_training(path: PathLike, training: Training) -> None:
    """Write a training atomically; the suffix of `path` selects the format.

    Raises:
        WeightsError: the suffix is unknown.
        OSError: the file cannot be written; an existing file is unchanged.
    """
    arrays = {f"{MODEL}.{name}": array for name, array in training.weights.items()}
    for kind, moments in training.moments.items():
        arrays |= {f"{OPTIMIZER}.{kind}.{name}": array for name, array in moments.items()}
    arrays[f"{OPTIMIZER}.{STEP}"] = np.array(training.step, np.int64)
    write_arrays(path, arrays, {"format": "pt"})


def read_training(path: PathLike, table: WeightTable, kinds: Iterable[str], parameters: Iterable[str]) -> Training:
    """Read a training for a model and its optimizer.

    Args:
        path: a file that `write_training` wrote.
        table: of the model.
        kinds: the optimizer's kinds of moments.
        parameters: PyTorch's names of the trained parameters.

    Raises:
        WeightsError: the file is not a training, has other moments than the optimizer, or does not match the model.
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
    step = None if value is None else as_lazy(value)
    if step is None or step.shape != () or step.dtype.kind not in "iu":
        raise WeightsError(f"{optimizer.label}: not a training: it has no step count {OPTIMIZER}.{STEP}")
    return int(step.read())


def refuse_moments(unknown: Iterable[object]) -> None:
    """Raise a TypeError if an optimizer has state that is not in `MOMENTS`."""
    if names := sorted(set(map(str, unknown))):
        known = ", ".join(f"{torch_name} ({optax_name})" for torch_name, optax_name in MOMENTS.items())
        raise TypeError(
            f"the optimizer has unknown state {', '.join(names)}; known: {known}, of Adam, AdamW and SGD with momentum"
        )
