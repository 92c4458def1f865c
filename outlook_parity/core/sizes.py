"""Inputs of another size, for what shows only there: windows, tables of positions, resizing. Imports no framework."""

from collections.abc import Mapping

import numpy as np

from outlook_common.arrays import is_floating

# In words, of which inputs -> by what their length is multiplied.
SIZES = {"twice as long": 2.0, "half as long": 0.5, "half as large": 0.5}

SEQUENCES, IMAGES = ("twice as long", "half as long"), ("half as large",)

# Shorter ones are not halved.
LEAST = 4


def resized(inputs: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Return inputs of other sizes by how; none where it cannot be told which axes are a length.

    Ids and masks (batch, length) and sequences (batch, length, channels) become longer and shorter, images smaller.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    axes: dict[str, tuple[int, ...]] = {name: _axes(array) for name, array in inputs.items()}
    sequences = [name for name, one in axes.items() if len(one) == 1]
    chosen = sequences or [name for name, one in axes.items() if len(one) == 2]
    if not chosen:
        return {}
    for how in SEQUENCES if sequences else IMAGES:
        changed = {name: _to_length(inputs[name], axes[name], SIZES[how]) for name in chosen}
        if all(array is not None for array in changed.values()):
            found[how] = {name: changed.get(name, array) for name, array in inputs.items()}  # type: ignore[misc]
    return found


def _axes(array: np.ndarray) -> tuple[int, ...]:
    """Return the axes of length, or of height and width; () if there are none."""
    if array.ndim == 2 and not is_floating(array):
        return (1,)
    if array.ndim == 3 and is_floating(array):
        return (1,)
    if array.ndim == 4 and is_floating(array):
        return (2, 3) if array.shape[1] < min(array.shape[2:]) else (1, 2)
    return ()


def _to_length(array: np.ndarray, axes: tuple[int, ...], factor: float) -> np.ndarray | None:
    for axis in axes:
        length = array.shape[axis]
        if factor > 1:
            array = np.concatenate([array, np.flip(array, axis)], axis)
        elif length < LEAST:
            return None
        else:
            array = np.take(array, range(int(length * factor)), axis)
    return array
