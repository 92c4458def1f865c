"""Names that correspond: of weights, with their layouts, and of modules. Imports no framework."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from outlook_parity.core.layout import Axes


def is_counter(name: str) -> bool:
    """Whether this is a count of batches of PyTorch's BatchNorm; Flax's has none."""
    return name.rpartition(".")[2] == "num_batches_tracked"


@dataclass(frozen=True)
class WeightName:
    """The names of one parameter or buffer, and its layout in Flax.

    Attributes:
        torch: its name in PyTorch.
        flax: its path in Flax.
        axes: the order in which Flax has PyTorch's axes; None for the same.
        part: (index, count) of the part of PyTorch's first axis that this is; None for all of it.
        shape: in Flax, where one axis of PyTorch's is several; None where there are as many.
        flipped: whether Flax has the axes of the window, all but the last two, reversed.
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
        """Return an array in Flax's layout in PyTorch's; for a part, that part."""
        if self.shape is not None:
            array = array.reshape(self._merged())
        if self.flipped:
            array = np.flip(array, tuple(range(array.ndim - 2)))
        fits = self.axes is not None and array.ndim == len(self.axes)
        return array.transpose(np.argsort(self.axes).tolist()) if fits else array  # type: ignore[arg-type]

    def _merged(self) -> tuple[int, ...]:
        """Return Flax's shape with the axes of the heads merged, as in PyTorch."""
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
        hints: name of a weight without counterpart, in either -> what to do about it.
    """

    def __init__(
        self, weights: Collection[WeightName], modules: Mapping[str, str], hints: Mapping[str, str] | None = None
    ) -> None:
        self.by_flax = {weight.flax: weight for weight in weights}
        self.expected = list(dict.fromkeys(weight.torch for weight in weights))
        self._modules = modules
        self._hints = hints or {}

    def module(self, flax: str) -> str:
        """Return PyTorch's path of a module."""
        return self._modules.get(flax, flax)

    def hint(self, name: str) -> str:
        """Return what to do about a weight without counterpart, in brackets; "" if nothing is known."""
        return f" ({self._hints[name]})" if name in self._hints else ""

    def under_torch_names(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return arrays by Flax path under PyTorch's names and in its layout, parts concatenated.

        An array without counterpart keeps its own name; one without all of its parts is left out: so it is found
        missing.
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
