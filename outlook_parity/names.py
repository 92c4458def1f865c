"""Which names of the twins correspond: of weights, with their layouts, and of modules. Imports no framework."""

import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from outlook_common.weights.models import table_for
from outlook_common.weights.table import LAYOUTS

Axes = tuple[int, ...]

# What Flax calls PyTorch's leaves.
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "mean": "running_mean", "var": "running_var"}

# In which order Flax has the axes of PyTorch's `weight`, by the type of PyTorch's module; any other has the same.
KERNEL_AXES: dict[str, Axes] = {
    "Linear": (1, 0),
    "Conv1d": (2, 1, 0),
    "Conv2d": (2, 3, 1, 0),
    "Conv3d": (2, 3, 4, 1, 0),
}


@dataclass(frozen=True)
class WeightName:
    """One parameter or buffer: its names, and in which order Flax has PyTorch's axes (None for the same)."""

    torch: str
    flax: str
    axes: Axes | None = None

    def to_flax(self, array: np.ndarray) -> np.ndarray:
        """Return an array in PyTorch's layout as a view in Flax's."""
        return array.transpose(self.axes) if self.axes is not None and array.ndim == len(self.axes) else array

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Return an array in Flax's layout as a view in PyTorch's."""
        fits = self.axes is not None and array.ndim == len(self.axes)
        return array.transpose(np.argsort(self.axes).tolist()) if fits else array  # type: ignore[arg-type]


@dataclass(frozen=True)
class Given:
    """What the user says about names.

    Attributes:
        modules: Flax path -> PyTorch path; what lies below goes with it.
        weights: Flax path -> PyTorch name, where the modules and Flax's usual names of leaves do not say it.
        axes: Flax path of a weight -> the order in which Flax has PyTorch's axes.
        torch_axes: the order in which PyTorch takes the axes of the inputs, None for the same as JAX.
    """

    modules: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    axes: Mapping[str, Axes] = field(default_factory=dict)
    torch_axes: Axes | None = None


def read_given(path: Path) -> Given:
    """Read a TOML file with the tables `modules`, `weights` and `axes` and the array `torch_axes`, all optional.

    Raises:
        ValueError: it is no TOML, or has other entries, or entries of other types.
        OSError: it cannot be read.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from error
    kinds = {"modules": str, "weights": str, "axes": list}
    for name, table in tables.items():
        if name == "torch_axes":
            continue
        if name not in kinds or not isinstance(table, dict):
            raise ValueError(f"{path}: {name!r} is none of the tables {', '.join(kinds)}, nor torch_axes")
        for key, value in table.items():
            if not isinstance(value, kinds[name]):
                raise ValueError(f"{path}: {name}.{key!r} must be a {kinds[name].__name__}, got {value!r}")
    axes = tables.get("torch_axes")
    return Given(
        tables.get("modules", {}),
        tables.get("weights", {}),
        {name: _permutation(order, f"{path}: axes of {name}") for name, order in tables.get("axes", {}).items()},
        None if axes is None else _permutation(axes, f"{path}: torch_axes"),
    )


def _permutation(order: Any, what: str) -> Axes:
    if not isinstance(order, list) or sorted(map(str, order)) != sorted(map(str, range(len(order)))):
        raise ValueError(f"{what} must be a permutation of 0, 1, …, as in [0, 3, 1, 2]; got {order!r}")
    return tuple(order)


class Names:
    """The names of a pair of twins.

    Args:
        weights: those that correspond.
        modules: Flax path -> PyTorch path, where they differ.
    """

    def __init__(self, weights: Collection[WeightName], modules: Mapping[str, str]) -> None:
        self.by_flax = {weight.flax: weight for weight in weights}
        self.expected = [weight.torch for weight in weights]
        self._modules = modules

    def module(self, flax: str) -> str:
        """Return what PyTorch calls a module."""
        return self._modules.get(flax, flax)


def names_of_table(config: Any) -> Names:
    """Return the names of a model of this package."""
    return Names(
        [WeightName(entry.torch, entry.flax, LAYOUTS[entry.layout]) for entry in table_for(config).entries], {}
    )


def derive_names(
    torch_weights: Mapping[str, str],
    torch_modules: Collection[str],
    flax_weights: Collection[str],
    flax_modules: Collection[str],
    given: Given,
) -> Names:
    """Return the names of anybody's twins: as `given`, else by Flax's usual names of leaves and modules.

    A module's `name_3` is PyTorch's `name.3` if there is no `name_3`. What has no counterpart keeps its own name, and
    so is found missing.

    Args:
        torch_weights: name -> type of the module that has it.
        torch_modules: their paths.
        flax_weights: their paths, joined by ".".
        flax_modules: likewise.
        given: what the user says.
    """
    modules = {
        path: _torch_path(path, torch_modules, given.modules)
        for path in {*flax_modules, *(name.rpartition(".")[0] for name in flax_weights)}
    }
    weights = []
    for flax in flax_weights:
        owner, _, leaf = flax.rpartition(".")
        torch = given.weights.get(flax) or ".".join(filter(None, (modules[owner], LEAVES.get(leaf, leaf))))
        kind = torch_weights.get(torch, "")
        axes = given.axes.get(flax, KERNEL_AXES.get(kind) if torch.endswith("weight") else None)
        weights.append(WeightName(torch if torch in torch_weights else flax, flax, axes))
    found = {weight.torch for weight in weights}
    missing = [WeightName(name, f"(no counterpart of {name})") for name in torch_weights if name not in found]
    return Names([*weights, *missing], modules)


def _torch_path(flax: str, known: Collection[str], given: Mapping[str, str]) -> str:
    steps = flax.split(".") if flax else []
    for length in range(len(steps), 0, -1):
        prefix = ".".join(steps[:length])
        if prefix in given:
            return ".".join(filter(None, (given[prefix], _numbered(steps[length:], given[prefix], known))))
    return _numbered(steps, "", known)


def _numbered(steps: list[str], prefix: str, known: Collection[str]) -> str:
    """Return the path below `prefix` with `name_3` as `name.3` where only that is known."""
    path: list[str] = []
    for step in steps:
        here = ".".join(filter(None, (prefix, *path, step)))
        split = re.sub(r"_(\d+)$", r".\1", step)
        dotted = ".".join(filter(None, (prefix, *path, split)))
        path.append(split if here not in known and dotted in known else step)
    return ".".join(path)
