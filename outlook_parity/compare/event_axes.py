"""Recorded events of one twin in the layout of the other. Imports no framework."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from outlook_parity.core.layout import Axes, fitting_axes, nearest_axes
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
    for key in torch:
        if key.path not in members or key not in jax:
            continue
        shapes, others = shapes_of(torch, key), shapes_of(jax, key)
        if len(shapes) == len(others):
            for index, (one, other) in enumerate(zip(shapes, others, strict=True)):
                orders = fitting_axes(one, other)
                if not orders and key.side == "out" and is_repeated(one, other):
                    orders = [tuple(range(len(one)))]
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
        if len(left) == 1:
            found[key, index] = left[0]
        else:
            found[key, index] = nearest_axes(torch[key][index], jax[key][index], left or orders)
    return found


def is_repeated(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether results are the same for all samples in one twin, as those of positions, and repeated in the other."""
    return len(one) == len(other) > 1 and one[1:] == other[1:] and 1 in (one[0], other[0])


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
