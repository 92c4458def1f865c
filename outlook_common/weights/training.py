"""Training checkpoints for both frameworks: weights, the optimizer's moments, the step.

In a file weights are below `model.`, each kind of moment below `optimizer.<kind>.`, all under PyTorch's names and in
its layout, whichever twin wrote them; `optimizer.step` is the number of steps done.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from outlook_common.weights.checkpoint import open_checkpoint
from outlook_common.weights.errors import WeightsError
from outlook_common.weights.formats.base import PathLike
from outlook_common.weights.formats.registry import write_arrays
from outlook_common.weights.match import resolve_checkpoint
from outlook_common.weights.tables.base import WeightTable
from outlook_common.weights.train_states import MODEL, OPTIMIZER, STEP, find_train_state

Arrays = dict[str, np.ndarray]

_CARRIED = (
    "Adam and AdamW (torch.optim.Adam, AdamW; optax.adam, adamw) and SGD, with momentum or without (torch.optim.SGD; "
    "optax.sgd)"
)


@dataclass(frozen=True)
class Training:
    """State of a training.

    Attributes:
        weights: every parameter and buffer, under PyTorch's names and in its layout.
        moments: kind -> arrays of the parameters that have such a moment, likewise.
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


def read_training(
    path: PathLike, table: WeightTable, moments: Mapping[str, Iterable[str]], step: int | None = None
) -> Training:
    """Read a training for a model and its optimizer, in any layout of `train_states`.

    Args:
        path: a file or folder.
        table: of the model.
        moments: kind -> PyTorch's names of the parameters of which the optimizer keeps such a moment.
        step: number of steps done; None means as many as the file says.

    Raises:
        WeightsError: the file is not a training, has other moments than the optimizer, or does not match the model.
        ValueError: parameters made different numbers of steps, or the file has none.
        OSError: the file cannot be opened.
    """
    checkpoint = open_checkpoint(path, wrapped=True)
    state = find_train_state(checkpoint, table, {name for names in moments.values() for name in names})
    if state.moments.keys() != moments.keys():
        has, wants = (", ".join(sorted(names)) or "none" for names in (state.moments, moments))
        raise WeightsError(f"{checkpoint.label}: it has the moments {has}, the optimizer needs {wants}")
    weights = resolve_checkpoint(state.weights, table)
    arrays = {}
    for kind in sorted(moments):
        names = set(moments[kind])
        entries = tuple(entry for entry in table.entries if entry.torch in names)
        kept = WeightTable(f"the optimizer of {table.model}", entries)
        arrays[kind] = resolve_checkpoint(state.moments[kind], kept)
    if step is None and not state.counts:
        raise ValueError(f"{checkpoint.label}: it counts no steps; give step=")
    return Training(weights, arrays, common_count(state.counts) if step is None else step)


def not_carried(found: str, *, instead: str = "") -> TypeError:
    """Return the error for an optimizer whose state another framework cannot continue.

    Args:
        found: what the optimizer is, or a part of it.
        instead: what would work; may be empty.
    """
    hint = f"; {instead}" if instead else ""
    return TypeError(f"the optimizer is {found}, whose state is not carried{hint}; carried are {_CARRIED}")


def common_count(counts: Iterable[int]) -> int:
    """Return the number of steps that all parts of an optimizer have counted.

    Raises:
        ValueError: they differ.
    """
    if len(steps := set(counts)) != 1:
        raise ValueError(f"the optimizer has made {sorted(steps)} steps, not the same for all parameters; give step=")
    return steps.pop()
