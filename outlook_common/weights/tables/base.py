"""One invertible table per model: PyTorch name ↔ Flax path, layout, shape."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

Layout = Literal["same", "linear", "conv"]

# For each layout the axes of PyTorch's array in Flax's order.
LAYOUTS: dict[Layout, tuple[int, ...] | None] = {
    "same": None,
    "linear": (1, 0),  # (out, in) -> (in, out)
    "conv": (2, 3, 1, 0),  # OIHW -> HWIO
}

TORCH, FLAX = "torch", "flax"


@dataclass(frozen=True)
class Entry:
    """One parameter or buffer.

    Attributes:
        torch: its name in PyTorch's state_dict.
        flax: its path in the NNX state, joined by ".".
        shape: in PyTorch's layout.
        layout: how PyTorch's axes are ordered in Flax; given here, never guessed from the number of axes.
        dtype: None for what has the model's floating-point dtype, else a fixed one ("int64" for a counter).
    """

    torch: str
    flax: str
    shape: tuple[int, ...]
    layout: Layout = "same"
    dtype: str | None = None

    def __post_init__(self) -> None:
        axes = LAYOUTS[self.layout]
        if axes is not None and len(axes) != len(self.shape):
            raise ValueError(f"{self.torch}: layout {self.layout!r} has {len(axes)} axes, its shape is {self.shape}")

    @property
    def flax_shape(self) -> tuple[int, ...]:
        """The shape in Flax's layout."""
        axes = LAYOUTS[self.layout]
        return self.shape if axes is None else tuple(self.shape[axis] for axis in axes)

    def shape_in(self, naming: str) -> tuple[int, ...]:
        """Return the shape in a naming's layout: Flax's, or PyTorch's for all others."""
        return self.flax_shape if naming == FLAX else self.shape

    def to_flax(self, array: np.ndarray) -> np.ndarray:
        """Return an array in PyTorch's layout as a view in Flax's."""
        axes = LAYOUTS[self.layout]
        return array if axes is None else array.transpose(axes)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Return an array in Flax's layout as a view in PyTorch's."""
        axes = LAYOUTS[self.layout]
        return array if axes is None else array.transpose(np.argsort(axes).tolist())


@dataclass(frozen=True)
class WeightTable:
    """The entries of a model, and what else they are called.

    Attributes:
        model: what the table describes, for messages.
        entries: in the order of PyTorch's state_dict.
        aliases: naming -> {name in that naming: PyTorch name}, for those that differ; PyTorch's layout.

    Raises:
        ValueError: two entries share a name in some naming, or an alias is of no entry.
    """

    model: str
    entries: tuple[Entry, ...]
    aliases: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch_names = {entry.torch for entry in self.entries}
        for naming, aliases in self.aliases.items():
            if strangers := set(aliases.values()) - torch_names:
                raise ValueError(f"{self.model}: aliases of {naming} stand for unknown {sorted(strangers)}")
        for naming in self.namings:
            names = list(self._named(naming))
            if len(dict(names)) != len(self.entries):
                twice = sorted({name for name, _ in names if [n for n, _ in names].count(name) > 1})
                raise ValueError(
                    f"{self.model}: {len(names)} names for {len(self.entries)} entries in {naming}: {twice}"
                )

    @property
    def namings(self) -> tuple[str, ...]:
        """All namings, the first one the torch twin's own."""
        return (TORCH, FLAX, *self.aliases)

    @cached_property
    def _by_naming(self) -> dict[str, dict[str, Entry]]:
        return {naming: dict(self._named(naming)) for naming in self.namings}

    def names(self, naming: str) -> dict[str, Entry]:
        """Return {name in this naming: entry}, a bijection.

        Raises:
            ValueError: this model has no such naming.
        """
        if naming not in self.namings:
            raise ValueError(f"{self.model} has no names in {naming!r}; known: {', '.join(self.namings)}")
        return self._by_naming[naming]

    def _named(self, naming: str) -> Iterator[tuple[str, Entry]]:
        if naming == FLAX:
            yield from ((entry.flax, entry) for entry in self.entries)
            return
        aliases = {torch_name: alias for alias, torch_name in self.aliases.get(naming, {}).items()}
        if len(aliases) != len(self.aliases.get(naming, {})):
            raise ValueError(f"{self.model}: two aliases of {naming} stand for one entry")
        yield from ((aliases.get(entry.torch, entry.torch), entry) for entry in self.entries)


def linear_entries(name: str, features_in: int, features_out: int, *, bias: bool = True) -> tuple[Entry, ...]:
    """Return the entries of a linear layer (`nn.Linear`, `nnx.Linear`) with this path."""
    kernel = Entry(f"{name}.weight", f"{name}.kernel", (features_out, features_in), "linear")
    return (kernel, Entry(f"{name}.bias", f"{name}.bias", (features_out,))) if bias else (kernel,)
