"""Record module calls, and replay them to the other twin. No framework.

Replayed, a recording replaces the inputs and the outputs of every module of the other twin. So each module's own code
runs on the other twin's numbers, and an error in one reaches no other.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Literal, NamedTuple

import numpy as np

Side = Literal["in", "out", "whole"]
Arrays = list[np.ndarray]

ROOT = ""


class Key(NamedTuple):
    """One side of one call: the module's path, which of its calls it is, and whether its arguments, its results, or
    those of its results that are whole numbers.
    """

    path: str
    call: int
    side: Side


class Recorder:
    """What the modules were called with and gave, in the order of events.

    Args:
        given: what to play, in this twin's layout; nothing if None.
        known: the modules to watch, all if None: others belong to whichever module calls them.
    """

    def __init__(self, given: Mapping[Key, Arrays] | None = None, known: Collection[str] | None = None) -> None:
        self.events: dict[Key, Arrays] = {}
        self.owners: dict[Key, str] = {}  # whose own code an event is the result of
        self._given = given or {}
        self._known = known
        self._calls: Counter[str] = Counter()
        self._stack: list[tuple[str, int]] = []

    def watches(self, path: str) -> bool:
        """Whether calls of this module are to be written down."""
        return self._known is None or path in self._known

    @property
    def inside(self) -> str | None:
        """The module whose code runs, None outside of all."""
        return self._stack[-1][0] if self._stack else None

    def enter(self, path: str, arrays: Arrays) -> Arrays | None:
        """Note a call; return what to call the module with instead, None for what it is."""
        parent = self.inside
        key = Key(path, self._calls[path], "in")
        self._calls[path] += 1
        self._stack.append((path, key.call))
        return self._note(key, arrays, parent)

    def leave(self, arrays: Arrays, whole: Arrays | None = None) -> Arrays | None:
        """Note what the module called last gives; return what it shall give instead, None for what it is.

        `whole` are numbers that tell where something is, or whether: they are noted, and replaced by nothing.
        """
        path, call = self._stack.pop()
        if whole:
            self._note(Key(path, call, "whole"), whole, path)
        return self._note(Key(path, call, "out"), arrays, path)

    def paths(self) -> list[str]:
        """Return the modules that were called, in the order in which they first returned."""
        return list(dict.fromkeys(key.path for key in self.events if key.side == "out"))

    def _note(self, key: Key, arrays: Arrays, owner: str | None) -> Arrays | None:
        self.events[key] = arrays
        if owner is not None:
            self.owners[key] = owner
        given = self._given.get(key)
        fits = given is not None and [array.shape for array in given] == [array.shape for array in arrays]
        return given if fits else None


def channels_last(ndim: int) -> tuple[int, ...]:
    """Return the axes that move the channels, the second axis, to the end."""
    return (0, *range(2, ndim), 1)


def fitting_axes(torch: tuple[int, ...], jax: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return in which orders PyTorch's axes may stand in JAX: as they are, channels last, or the batch before the steps
    of a sequence; those that shapes allow.
    """
    ndim = len(torch)
    candidates = [tuple(range(ndim))]
    if ndim > 2:
        candidates.append(channels_last(ndim))
    if ndim == 3:
        candidates.append((1, 0, 2))
    return [axes for axes in candidates if tuple(torch[axis] for axis in axes) == jax]


def axes_to_jax(torch: np.ndarray, jax: np.ndarray) -> tuple[int, ...] | None:
    """Return in which order JAX has the axes of PyTorch's array; None if none fits.

    Where sizes leave the choice, the numbers decide: the order with the smallest difference.
    """
    fitting = fitting_axes(torch.shape, jax.shape)
    if len(fitting) < 2:
        return fitting[0] if fitting else None
    distances = [_distance(torch.transpose(axes), jax) for axes in fitting]
    return fitting[int(np.argmin(distances))]


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    with np.errstate(invalid="ignore"):  # Inf - Inf
        difference = np.abs(one.astype(np.float64) - other.astype(np.float64))
    return float(difference[np.isfinite(difference)].mean()) if np.isfinite(difference).any() else 0.0
