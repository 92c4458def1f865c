"""Which names of the twins correspond: of weights, with their layouts, and of modules. Imports no framework."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from outlook_common.weights.identify import table_for
from outlook_common.weights.tables.base import LAYOUTS

Axes = tuple[int, ...]


def is_counter(name: str) -> bool:
    """Whether PyTorch calls so what its BatchNorm counts batches in; Flax's counts none."""
    return name.rpartition(".")[2] == "num_batches_tracked"


@dataclass(frozen=True)
class WeightName:
    """One parameter or buffer: its names, and how Flax has what PyTorch has.

    Attributes:
        torch: its name in PyTorch.
        flax: its path in Flax.
        axes: the order in which Flax has PyTorch's axes, None for the same.
        part: (which, of how many) parts of PyTorch's first axis this is; None for all of it.
        shape: in Flax, where it has one axis of PyTorch's as several; None where it has as many.
        flipped: whether Flax has the axes of the window, all but the last two, the other way round.
    """

    torch: str
    flax: str
    axes: Axes | None = None
    part: tuple[int, int] | None = None
    shape: tuple[int, ...] | None = None
    flipped: bool = False

    def to_flax(self, array: np.ndarray) -> np.ndarray:
        """Return an array in PyTorch's layout in Flax's."""
        if self.part is not None:
            array = np.split(array, self.part[1])[self.part[0]]
        if self.axes is not None and array.ndim == len(self.axes):
            array = array.transpose(self.axes)
        if self.flipped:
            array = np.flip(array, tuple(range(array.ndim - 2)))
        return array if self.shape is None or math.prod(self.shape) != array.size else array.reshape(self.shape)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Return an array in Flax's layout in PyTorch's, of a part the part."""
        if self.shape is not None:
            array = array.reshape(self._merged())
        if self.flipped:
            array = np.flip(array, tuple(range(array.ndim - 2)))
        fits = self.axes is not None and array.ndim == len(self.axes)
        return array.transpose(np.argsort(self.axes).tolist()) if fits else array  # type: ignore[arg-type]

    def _merged(self) -> tuple[int, ...]:
        """Return Flax's shape with the axes that are one in PyTorch as one: those of the heads."""
        assert self.shape is not None
        if self.axes is None:
            return (math.prod(self.shape),)
        outwards = self.flax.endswith("out.kernel")
        return (math.prod(self.shape[:-1]), self.shape[-1]) if outwards else (self.shape[0], math.prod(self.shape[1:]))


class Names:
    """The names of a pair of twins.

    Args:
        weights: those that correspond.
        modules: Flax path -> PyTorch path, where they differ.
        hints: name of a weight without counterpart, in either -> what could be said about it.
    """

    def __init__(
        self, weights: Collection[WeightName], modules: Mapping[str, str], hints: Mapping[str, str] | None = None
    ) -> None:
        self.by_flax = {weight.flax: weight for weight in weights}
        self.expected = list(dict.fromkeys(weight.torch for weight in weights))
        self._modules = modules
        self._hints = hints or {}

    def module(self, flax: str) -> str:
        """Return what PyTorch calls a module."""
        return self._modules.get(flax, flax)

    def hint(self, name: str) -> str:
        """Return what to do about a weight without counterpart, in brackets; "" if nothing is known."""
        return f" ({self._hints[name]})" if name in self._hints else ""

    def under_torch_names(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return arrays by Flax path as PyTorch has them, parts put together.

        What has no counterpart, or not all of its parts, keeps its own name, and so is found missing.
        """
        named: dict[str, np.ndarray] = {}
        parts: dict[str, dict[int, np.ndarray]] = {}
        for flax, array in arrays.items():
            weight = self.by_flax.get(flax)
            if weight is None:
                named[flax] = array
            elif weight.part is None:
                named[weight.torch] = weight.to_torch(array)
            else:
                parts.setdefault(weight.torch, {})[weight.part[0]] = weight.to_torch(array)
                if len(parts[weight.torch]) == weight.part[1]:
                    named[weight.torch] = np.concatenate([parts[weight.torch][n] for n in range(weight.part[1])])
        return named


def names_of_table(config: Any) -> Names:
    """Return the names of a model of this package."""
    return Names(
        [WeightName(entry.torch, entry.flax, LAYOUTS[entry.layout]) for entry in table_for(config).entries], {}
    )
