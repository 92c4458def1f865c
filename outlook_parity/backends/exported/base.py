"""An exported program: outputs alone, in the one precision that it was exported in."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from outlook_common.text import listed
from outlook_parity.core.layout import Axes
from outlook_parity.core.precision import PRECISIONS

# Precisions that are dtypes, by dtype.
_BY_DTYPE = {one.storage: name for name, one in PRECISIONS.items() if one.products == "full"}


@dataclass(frozen=True)
class Port:
    """An input of an exported program.

    Attributes:
        name: as the program has it.
        dtype: which it takes alone.
        shape: None for sizes that are open.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int | None, ...]

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether an array of this shape fits."""
        return len(shape) == len(self.shape) and all(
            own in (None, size) for own, size in zip(self.shape, shape, strict=True)
        )

    def __str__(self) -> str:
        sizes = ", ".join("?" if size is None else str(size) for size in self.shape)
        return f"{self.name} {self.dtype} ({sizes})"


def open_sizes(shape: Iterable[Any]) -> tuple[int | None, ...]:
    """Return the sizes of a shape, None for one that is a symbol or a name."""
    return tuple(size if isinstance(size, int) else None for size in shape)


class Exported(ABC):
    """An exported program.

    Attributes:
        label: what it is, for messages.
        inputs: in the order of the arguments.
    """

    label: str
    inputs: tuple[Port, ...]

    @abstractmethod
    def call(self, arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs by path, "output" or "output.0"…; arrays have the dtypes of the inputs."""

    @property
    def dtype(self) -> str:
        """The precision of its floating-point inputs.

        Raises:
            ValueError: they have several, or there are none.
        """
        found = {port.dtype for port in self.inputs} & _BY_DTYPE.keys()
        if len(found) != 1:
            raise ValueError(
                f"{self.label} must have floating-point inputs of one dtype, has {listed(list(map(str, self.inputs)))}"
            )
        return _BY_DTYPE[found.pop()]

    def check_inputs(self, inputs: Mapping[str, np.ndarray], axes: Mapping[str, Axes]) -> None:
        """Check number and shapes of the inputs.

        Raises:
            ValueError: they do not fit; the message says what was given and what the program takes.
        """
        given = [tuple(array.shape[axis] for axis in axes[name]) for name, array in inputs.items()]
        fit = len(given) == len(self.inputs) and all(
            port.takes(shape) for port, shape in zip(self.inputs, given, strict=True)
        )
        if not fit:
            shapes = listed([f"{name} {shape}" for name, shape in zip(inputs, given, strict=True)])
            raise ValueError(f"{self.label} takes {listed(list(map(str, self.inputs)))}; got {shapes}")
