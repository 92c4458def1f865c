"""Recorded events of one twin in the layout of the other. Imports no framework."""

from collections.abc import Sequence

import numpy as np

from outlook_parity.core.layout import Axes, axes_to_jax
from outlook_parity.core.recorder import Arrays, Events, Key

# Of an event and the index of an array in it: the order in which JAX has PyTorch's axes.
EventAxes = dict[tuple[Key, int], Axes]


def event_axes(torch: Events, jax: Events, shared: Sequence[str]) -> EventAxes:
    """Return for each array of both in which order JAX has PyTorch's axes; without those that do not fit."""
    found: EventAxes = {}
    members = set(shared)
    for key, arrays in torch.items():
        others = jax.get(key, [])
        if key.path in members and len(arrays) == len(others):
            for index, (one, other) in enumerate(zip(arrays, others, strict=True)):
                axes = axes_to_jax(one, other) if one.ndim == other.ndim else None
                if axes is not None:
                    found[key, index] = axes
    return found


def has_axes(key: Key, arrays: Arrays, axes: EventAxes) -> bool:
    """Whether the order of axes of every array of an event is known."""
    return all((key, index) in axes for index in range(len(arrays)))


def in_jax_layout(events: Events, axes: EventAxes) -> Events:
    """Return PyTorch's events with JAX's order of axes, without those whose axes do not fit."""
    return {
        key: [array.transpose(axes[key, index]) for index, array in enumerate(arrays)]
        for key, arrays in events.items()
        if has_axes(key, arrays, axes) and all(array.ndim == len(axes[key, i]) for i, array in enumerate(arrays))
    }


def in_torch_layout(events: Events, axes: EventAxes) -> Events:
    """Return events in JAX's layout with PyTorch's order of axes, without those of which it is not known."""
    return {
        key: [array.transpose(np.argsort(axes[key, index])) for index, array in enumerate(arrays)]
        for key, arrays in events.items()
        if has_axes(key, arrays, axes)
    }
