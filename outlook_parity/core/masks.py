"""Positions of outputs that count, where padding leaves others undefined. Imports no framework."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from outlook_common.text import listed
from outlook_parity.core.request import Inputs

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class OutputMasks:
    """Which positions of the outputs count.

    Attributes:
        by_output: output -> True where it counts, of the output's shape in JAX; none for outputs that count everywhere.
        positions: the same for the leading axes of any array inside the models, None for all.
        notes: what is excluded, in words.
    """

    by_output: Mapping[str, np.ndarray] = field(default_factory=dict)
    positions: np.ndarray | None = None
    notes: tuple[str, ...] = ()


def output_masks(given: Any, inputs: Inputs, outputs: Shapes) -> OutputMasks:
    """Return which positions of the outputs count: as given, else all but samples that an input masks altogether.

    Args:
        given: True (or not 0) where a position counts: an array for the leading axes of the outputs, as of (batch,
            steps); a mapping from outputs to such arrays; or None.
        inputs: by name; a sample for which a mask among them is 0 everywhere is undefined in both twins.
        outputs: shapes in JAX by name.

    Raises:
        ValueError: a mask fits no output, or nothing would count.
    """
    if isinstance(given, Mapping):
        if unknown := given.keys() - outputs.keys():
            raise ValueError(f"output_mask names {listed(sorted(unknown))}; the outputs are {listed(outputs)}")
        masks = {name: _checked(mask, name, outputs[name]) for name, mask in given.items()}
        return OutputMasks(masks, None, tuple(_excluded(mask, name) for name, mask in masks.items()))
    positions, notes = (None, []) if given is None else (np.asarray(given) != 0, [])
    if positions is None and (found := _undefined_samples(inputs)) is not None:
        positions, notes = found[1], [found[0]]
    if positions is None:
        return OutputMasks()
    fitting = {name: shape for name, shape in outputs.items() if shape[: positions.ndim] == positions.shape}
    if not fitting:
        if given is None:
            return OutputMasks()
        shapes = ", ".join(f"{name} {shape}" for name, shape in outputs.items())
        raise ValueError(f"output_mask of shape {positions.shape} fits the leading axes of no output: {shapes}")
    masks = {name: _checked(positions, name, shape) for name, shape in fitting.items()}
    return OutputMasks(masks, positions, tuple(notes or [_excluded(m, name) for name, m in masks.items()]))


def _checked(mask: Any, name: str, shape: tuple[int, ...]) -> np.ndarray:
    kept = np.asarray(mask) != 0
    if shape[: kept.ndim] != kept.shape:
        raise ValueError(f"output_mask of {name} has shape {kept.shape}, the output {shape}")
    if not kept.any():
        raise ValueError(f"output_mask of {name} is 0 everywhere: nothing would be compared")
    return np.broadcast_to(kept.reshape(kept.shape + (1,) * (len(shape) - kept.ndim)), shape)


def _excluded(mask: np.ndarray, name: str) -> str:
    return f"{int((~mask).sum())} of {mask.size} numbers of {name} were excluded by output_mask"


def _undefined_samples(inputs: Inputs) -> tuple[str, np.ndarray] | None:
    """Return why some samples are undefined, and which are not; None if all are defined."""
    for name, array in inputs.items():
        if "mask" not in name.lower() or array.dtype.kind not in "iub" or array.ndim < 2:
            continue
        kept = np.asarray(array.reshape(len(array), -1).any(axis=1))
        if kept.any() and not kept.all():
            out = [int(index) for index in np.flatnonzero(~kept)]
            return f"samples {listed(out)} of {len(kept)} were excluded: {name} is 0 everywhere in them", kept
    return None
