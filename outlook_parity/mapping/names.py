"""Names that correspond: of weights, with their layouts, and of modules. Imports no framework."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from outlook_parity.core.layout import Axes
from outlook_parity.mapping.layouts import Part, Parts, Shape, assembled, part_of

__all__ = ["Names", "Part", "WeightName", "is_counter"]


def is_counter(name: str) -> bool:
    """Whether this is a count of batches of PyTorch's BatchNorm; Flax's has none."""
    return name.rpartition(".")[2] == "num_batches_tracked"


@dataclass(frozen=True)
class WeightName:
    """The names of one parameter or buffer, and its layout in Flax.

    From PyTorch to Flax: a part is taken, its axes are permuted, the window is flipped, it is reshaped, and it becomes
    a piece of Flax's array.

    Attributes:
        torch: its name in PyTorch.
        flax: its path in Flax.
        axes: the order in which Flax has PyTorch's axes; None for the same.
        parts: of PyTorch's array, the part that this is; () for all of it.
        reshaped: the shapes before and after, where Flax has other axes; None where it has the same.
        flipped: whether Flax has the axes of the window, all but the last two, reversed.
        pieces: of Flax's array, the part that this is; () for all of it.
    """

    torch: str
    flax: str
    axes: Axes | None = None
    parts: Parts = ()
    reshaped: tuple[Shape, Shape] | None = None
    flipped: bool = False
    pieces: Parts = ()

    def to_flax(self, array: np.ndarray) -> np.ndarray:
        """Return an array in PyTorch's layout in Flax's; for a piece, that piece."""
        array = part_of(array, self.parts)
        if self.axes is not None and array.ndim == len(self.axes):
            array = array.transpose(self.axes)
        if self.flipped:
            array = np.flip(array, tuple(range(array.ndim - 2)))
        return array if self.reshaped is None or array.shape != self.reshaped[0] else array.reshape(self.reshaped[1])

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Return an array in Flax's layout in PyTorch's; for a part, that part."""
        array = part_of(array, self.pieces)
        if self.reshaped is not None and math.prod(self.reshaped[0]) == array.size:
            array = array.reshape(self.reshaped[0])
        if self.flipped:
            array = np.flip(array, tuple(range(array.ndim - 2)))
        fits = self.axes is not None and array.ndim == len(self.axes)
        return array.transpose(np.argsort(self.axes).tolist()) if fits else array  # type: ignore[arg-type]


@dataclass(frozen=True)
class Found:
    """How weights were found to correspond.

    Attributes:
        counts: "map", "names", "structure", "values" -> how many weights of Flax.
        candidates: weight of Flax without counterpart -> weights of PyTorch that it may be.
        left: weights of PyTorch without counterpart.
        modules: JAX's path -> PyTorch's, of modules that both twins have under different paths.
    """

    counts: Mapping[str, int] = field(default_factory=dict)
    candidates: Mapping[str, list[str]] = field(default_factory=dict)
    left: Collection[str] = ()
    modules: Mapping[str, str] = field(default_factory=dict)


class Names:
    """The names of a pair of twins.

    Args:
        weights: those that correspond.
        modules: Flax path -> PyTorch path, where they differ.
        hints: name of a weight without counterpart, in either -> what to do about it.
        found: how they were found.
    """

    def __init__(
        self,
        weights: Collection[WeightName],
        modules: Mapping[str, str],
        hints: Mapping[str, str] | None = None,
        found: Found | None = None,
    ) -> None:
        self.pieces: dict[str, list[WeightName]] = {}
        for weight in weights:
            self.pieces.setdefault(weight.flax, []).append(weight)
        self.by_flax = {flax: pieces[0] for flax, pieces in self.pieces.items()}
        self.expected = list(dict.fromkeys(weight.torch for weight in weights))
        self.modules = modules
        self.found = found or Found()
        self._hints = hints or {}

    def module(self, flax: str) -> str:
        """Return PyTorch's path of a module."""
        return self.modules.get(flax, flax)

    def hint(self, name: str) -> str:
        """Return what to do about a weight without counterpart, in brackets; "" if nothing is known."""
        return f" ({self._hints[name]})" if name in self._hints else ""

    def under_torch_names(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return arrays by Flax path under PyTorch's names and in its layout, parts put together.

        An array without counterpart keeps its own name; one without all of its parts is left out: so it is found
        missing.
        """
        named: dict[str, np.ndarray] = {}
        parts: dict[str, list[tuple[Parts, np.ndarray]]] = {}
        for flax, array in arrays.items():
            for weight in self.pieces.get(flax, [WeightName(flax, flax)]):
                piece = weight.to_torch(array)
                if weight.parts:
                    parts.setdefault(weight.torch, []).append((weight.parts, piece))
                else:
                    named[weight.torch] = piece
        for torch, pieces in parts.items():
            if (whole := assembled(pieces)) is not None:
                named[torch] = whole
        return named

    def groups(self, flax: Iterable[str]) -> list[list[str]]:
        """Return paths of Flax in the smallest groups that give whole arrays of PyTorch."""
        groups: dict[str, list[str]] = {}  # by path, and by weight of PyTorch that has its parts in several
        for path in flax:
            wholes = [weight.torch for weight in self.pieces.get(path, ()) if weight.parts]
            joined = {id(group): group for whole in wholes if (group := groups.get(f"whole {whole}")) is not None}
            group = [*(one for known in joined.values() for one in known), path]
            groups |= dict.fromkeys([*(f"path {one}" for one in group), *(f"whole {whole}" for whole in wholes)], group)
            groups |= {key: group for key, known in groups.items() if id(known) in joined}
        return list({id(group): group for group in groups.values()}.values())

    def in_flax_layout(self, flax: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """Return a weight of Flax from PyTorch's arrays by name; None if some are missing or do not fit."""
        pieces = self.pieces[flax]
        if any(weight.torch not in arrays for weight in pieces):
            return None
        if len(pieces) == 1 and not pieces[0].pieces:
            return pieces[0].to_flax(arrays[pieces[0].torch])
        return assembled((weight.pieces, weight.to_flax(arrays[weight.torch])) for weight in pieces)
