"""Recorded events of one twin in the layout of the other. Imports no framework."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from outlook_parity.core.layout import Axes, fitting_axes, nearest_axes
from outlook_parity.core.recorder import Arrays, Events, Key

# Of an event and the index of an array in it: the order in which JAX has PyTorch's axes.
EventAxes = dict[tuple[Key, int], Axes]


# Types of PyTorch's modules whose arguments and results have one layout.
_ONE_LAYOUT = ("Conv", "BatchNorm", "InstanceNorm", "GroupNorm", "MaxPool", "AvgPool", "Adaptive", "Upsample")


def event_axes(torch: Events, jax: Events, shared: Sequence[str], kinds: Mapping[str, str] | None = None) -> EventAxes:
    """Return for each array of both in which order JAX has PyTorch's axes; without those that do not fit.

    Where several fit by shape, the order of arrays that fit in one alone: of modules of this type, on this side, or on
    either where a type has one layout. Where these tell nothing or not the same, the one that is nearest in numbers.

    Args:
        torch: recorded in PyTorch.
        jax: recorded in JAX.
        shared: the modules that both have.
        kinds: path -> type of PyTorch's module.
    """
    kinds = kinds or {}
    fitting: dict[tuple[Key, int], list[Axes]] = {}
    members = set(shared)
    for key, arrays in torch.items():
        others = jax.get(key, [])
        if key.path in members and len(arrays) == len(others):
            for index, (one, other) in enumerate(zip(arrays, others, strict=True)):
                orders = fitting_axes(one.shape, other.shape) if one.ndim == other.ndim else []
                if orders:
                    fitting[key, index] = orders

    def alike(key: Key, ndim: int) -> tuple[str, str, int]:
        kind = kinds.get(key.path, key.path)
        return kind, "" if kind.startswith(_ONE_LAYOUT) else key.side, ndim

    known: defaultdict[tuple[str, str, int], set[Axes]] = defaultdict(set)
    for (key, _), orders in fitting.items():
        if len(orders) == 1:
            known[alike(key, len(orders[0]))].add(orders[0])
    found: EventAxes = {}
    for (key, index), orders in fitting.items():
        left = [order for order in orders if order in known[alike(key, len(orders[0]))]] if len(orders) > 1 else orders
        one, other = torch[key][index], jax[key][index]
        found[key, index] = left[0] if len(left) == 1 else nearest_axes(one, other, left or orders)
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
