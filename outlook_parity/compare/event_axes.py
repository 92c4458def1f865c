"""Recorded events of one twin in the layout of the other. Imports no framework."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from outlook_parity.core.layout import Axes, axes_to_jax, fitting_axes
from outlook_parity.core.recorder import Arrays, Events, Key, Shaped, shapes_of

# Of an event and the index of an array in it: the order in which JAX has PyTorch's axes.
EventAxes = dict[tuple[Key, int], Axes]


class _Relaid(Mapping[Key, Arrays], Shaped):
    """Events with other orders of axes, read one at a time."""

    def __init__(self, events: Events, keys: Iterable[Key], order: Callable[[Key, int], Sequence[int]]) -> None:
        self._events, self._keys, self._order = events, dict.fromkeys(keys), order

    def __getitem__(self, key: Key) -> Arrays:
        if key not in self._keys:
            raise KeyError(key)
        return [array.transpose(self._order(key, index)) for index, array in enumerate(self._events[key])]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def shapes(self, key: Key) -> list[tuple[int, ...]]:
        """See `Shaped`."""
        shapes = enumerate(shapes_of(self._events, key))
        return [tuple(shape[axis] for axis in self._order(key, index)) for index, shape in shapes]


def event_axes(torch: Events, jax: Events, shared: Sequence[str]) -> EventAxes:
    """Return for each array of both in which order JAX has PyTorch's axes; without those that do not fit."""
    found: EventAxes = {}
    members = set(shared)
    for key in torch:
        if key.path not in members or key not in jax:
            continue
        shapes, others = shapes_of(torch, key), shapes_of(jax, key)
        if len(shapes) != len(others):
            continue
        fitting = [fitting_axes(one, other) for one, other in zip(shapes, others, strict=True)]
        if any(len(orders) > 1 for orders in fitting):  # the numbers tell
            pairs = zip(torch[key], jax[key], strict=True)
            fitting = [[axes] if (axes := axes_to_jax(one, other)) else [] for one, other in pairs]
        found |= {(key, index): orders[0] for index, orders in enumerate(fitting) if orders}
    return found


def _has_axes(key: Key, events: Events, axes: EventAxes) -> bool:
    return all((key, index) in axes for index in range(len(shapes_of(events, key))))


def with_axes(events: Events, axes: EventAxes) -> Events:
    """Return the events of which the order of axes is known, as they are."""
    keys = (key for key in events if _has_axes(key, events, axes))
    return _Relaid(events, keys, lambda key, index: range(len(axes[key, index])))


def in_jax_layout(events: Events, axes: EventAxes) -> Events:
    """Return PyTorch's events with JAX's order of axes, without those whose axes do not fit."""

    def fits(key: Key) -> bool:
        shapes = enumerate(shapes_of(events, key))
        return _has_axes(key, events, axes) and all(len(shape) == len(axes[key, index]) for index, shape in shapes)

    return _Relaid(events, filter(fits, events), lambda key, index: axes[key, index])


def in_torch_layout(events: Events, axes: EventAxes) -> Events:
    """Return events in JAX's layout with PyTorch's order of axes, without those of which it is not known."""
    keys = (key for key in events if _has_axes(key, events, axes))
    return _Relaid(events, keys, lambda key, index: np.argsort(axes[key, index]).tolist())
