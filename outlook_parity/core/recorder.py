"""Record the calls of modules, and replay them to the other twin. Imports no framework.

Replayed, a recording replaces the inputs and the outputs of every module of the other twin. So each module's own code
runs on the other twin's numbers, and an error in one reaches no other.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from typing import Literal, NamedTuple

import numpy as np

from outlook_parity.core.stored import Kept, Shelf

# "whole" are results that are integers or booleans.
Side = Literal["in", "out", "whole"]
Arrays = list[np.ndarray]

ROOT = ""


class Key(NamedTuple):
    """One side of one call: the module's path, the call's number, and its arguments, results or integer results."""

    path: str
    call: int
    side: Side


Events = Mapping[Key, Arrays]


class Shaped(ABC):
    """Events whose shapes are known without reading them."""

    @abstractmethod
    def shapes(self, key: Key) -> list[tuple[int, ...]]:
        """Return the shapes of the arrays of an event."""


class StoredEvents(MutableMapping[Key, Arrays], Shaped):
    """Events in the order in which they happened, their large arrays in a file."""

    def __init__(self) -> None:
        self._shelf = Shelf()
        self._kept: dict[Key, list[Kept]] = {}

    def shapes(self, key: Key) -> list[tuple[int, ...]]:
        """See `Shaped`."""
        return [kept.shape for kept in self._kept[key]]

    def __setitem__(self, key: Key, arrays: Arrays) -> None:
        self._kept[key] = list(map(self._shelf.keep, arrays))

    def __getitem__(self, key: Key) -> Arrays:
        return list(map(self._shelf.read, self._kept[key]))

    def __delitem__(self, key: Key) -> None:
        del self._kept[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)


def shapes_of(events: Events, key: Key) -> list[tuple[int, ...]]:
    """Return the shapes of the arrays of an event."""
    return events.shapes(key) if isinstance(events, Shaped) else [array.shape for array in events[key]]


class Recorder:
    """Arguments and results of modules, in the order of events.

    Args:
        replay: what to replace them by, in this twin's layout; nothing if None.
        modules: the modules to watch, all if None: others belong to whichever module calls them.

    Attributes:
        events: the arrays of each side of each call.
        owners: of each event, the module whose own code it is the result of.
    """

    def __init__(self, replay: Events | None = None, modules: Collection[str] | None = None) -> None:
        self.events: MutableMapping[Key, Arrays] = StoredEvents()
        self.owners: dict[Key, str] = {}
        self._replay = replay or {}
        self._modules = modules
        self._calls: Counter[str] = Counter()
        self._stack: list[tuple[str, int]] = []

    def watches(self, path: str) -> bool:
        """Whether calls of this module are to be recorded."""
        return self._modules is None or path in self._modules

    @property
    def inside(self) -> str | None:
        """The module whose code runs, None outside of all."""
        return self._stack[-1][0] if self._stack else None

    def forget(self) -> None:
        """Begin anew, for a model that is run again."""
        self.events = StoredEvents()
        for record in (self.owners, self._calls, self._stack):
            record.clear()

    def enter(self, path: str, arrays: Arrays) -> Arrays | None:
        """Record a call; return what to call the module with instead, None for what it is."""
        parent = self.inside
        key = Key(path, self._calls[path], "in")
        self._calls[path] += 1
        self._stack.append((path, key.call))
        return self._record(key, arrays, parent)

    def leave(self, arrays: Arrays, integers: Arrays | None = None) -> Arrays | None:
        """Record the results of the last call; return what to return instead, None for what they are.

        Integers and booleans, positions and masks say, are recorded and never replaced.
        """
        path, call = self._stack.pop()
        if integers:
            self._record(Key(path, call, "whole"), integers, path)
        return self._record(Key(path, call, "out"), arrays, path)

    def paths(self) -> list[str]:
        """Return the modules that were called, in the order in which they first returned."""
        return list(dict.fromkeys(key.path for key in self.events if key.side == "out"))

    def _record(self, key: Key, arrays: Arrays, owner: str | None) -> Arrays | None:
        self.events[key] = arrays
        if owner is not None:
            self.owners[key] = owner
        replay = self._replay.get(key)
        fits = replay is not None and [array.shape for array in replay] == [array.shape for array in arrays]
        return replay if fits else None
