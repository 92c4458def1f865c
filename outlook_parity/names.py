"""Which names of the twins correspond: of weights, with their layouts, and of modules. Imports no framework."""

import math
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from outlook_common.weights.models import table_for
from outlook_common.weights.table import LAYOUTS

Axes = tuple[int, ...]

# What Flax calls PyTorch's leaves.
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "mean": "running_mean", "var": "running_var"}

# In which order Flax has the axes of PyTorch's `weight`, by the type of PyTorch's module; any other has the same.
KERNEL_AXES: dict[str, Axes] = {
    "Linear": (1, 0),
    "NonDynamicallyQuantizableLinear": (1, 0),  # the output projection of PyTorch's MultiheadAttention
    "Conv1d": (2, 1, 0),
    "Conv2d": (2, 3, 1, 0),
    "Conv3d": (2, 3, 4, 1, 0),
    "ConvTranspose1d": (2, 0, 1),
    "ConvTranspose2d": (2, 3, 0, 1),
    "ConvTranspose3d": (2, 3, 4, 0, 1),
}

# PyTorch's MultiheadAttention has queries, keys and values in one matrix, Flax's one projection for each.
ATTENTION = "MultiheadAttention"
PROJECTIONS = ("query", "key", "value")

# Layers that Flax keeps in other weights than PyTorch, not just elsewhere.
NOT_MAPPED = {
    kind: f"Flax's cells have other weights than PyTorch's {kind}: one bias where it has two, the gates apart; write "
    "the twin with PyTorch's own weights (weight_ih_l0, …) as parameters of these names"
    for kind in ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
}


class TorchLeaf(NamedTuple):
    """A weight in PyTorch: the type of the module that has it, and its shape."""

    kind: str
    shape: tuple[int, ...]


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


@dataclass(frozen=True)
class Given:
    """What the user says about names.

    Attributes:
        modules: Flax path -> PyTorch path; what lies below goes with it.
        weights: Flax path -> PyTorch name, where the modules and Flax's usual names of leaves do not say it.
        axes: Flax path of a weight -> the order in which Flax has PyTorch's axes.
        torch_axes: the order in which PyTorch takes the axes of the inputs that have so many, None for the same as
            JAX; or one such order, or None, per input.
        out_axes: output, "output" or as in "output.logits" -> the order in which JAX has PyTorch's axes; told by the
            shapes where they leave no choice.
    """

    modules: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    axes: Mapping[str, Axes] = field(default_factory=dict)
    torch_axes: Axes | Sequence[Axes | None] | None = None
    out_axes: Mapping[str, Axes] = field(default_factory=dict)


def torch_axes_of(given: Given, inputs: Mapping[str, np.ndarray], usual: Axes | None) -> dict[str, Axes]:
    """Return by input in which order PyTorch takes the axes; as given, else `usual`, else the same.

    Raises:
        ValueError: the orders given do not fit the inputs.
    """
    asked = given.torch_axes if given.torch_axes is not None else usual
    same = {name: tuple(range(array.ndim)) for name, array in inputs.items()}
    if asked is None:
        return same
    shapes = ", ".join(f"{name} {array.shape}" for name, array in inputs.items())
    if all(isinstance(axis, int) for axis in asked):
        order: Axes = tuple(asked)  # type: ignore[arg-type]
        if not any(len(order) == array.ndim for array in inputs.values()):
            raise ValueError(f"torch_axes={list(order)} has {len(order)} axes; no input has as many: {shapes}")
        orders = {name: order if len(axes) == len(order) else axes for name, axes in same.items()}
    elif len(asked) != len(inputs):
        raise ValueError(f"torch_axes has {len(asked)} orders of axes, there are {len(inputs)} inputs: {shapes}")
    else:
        orders = {
            name: same[name] if order is None else tuple(order)  # type: ignore[arg-type]
            for name, order in zip(inputs, asked, strict=True)
        }
    for name, order in orders.items():
        if sorted(order) != list(same[name]):
            raise ValueError(f"torch_axes of {name}, of shape {inputs[name].shape}, must not be {list(order)}")
    return orders


def read_given(path: Path) -> Given:
    """Read a TOML file: the tables `modules`, `weights`, `axes` and `out_axes`, the array `torch_axes`; all optional.

    Raises:
        ValueError: it is no TOML, or has other entries, or entries of other types.
        OSError: it cannot be read.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error
    kinds = {"modules": str, "weights": str, "axes": list, "out_axes": list}
    for name, table in tables.items():
        if name == "torch_axes":
            continue
        if name not in kinds or not isinstance(table, dict):
            raise ValueError(f"{path}: {name!r} is none of the tables {', '.join(kinds)}, nor torch_axes")
        for key, value in table.items():
            if not isinstance(value, kinds[name]):
                raise ValueError(f"{path}: {name}.{key!r} must be a {kinds[name].__name__}, got {value!r}")
    orders = {
        kind: {name: _permutation(order, f"{path}: {kind} of {name}") for name, order in tables.get(kind, {}).items()}
        for kind in ("axes", "out_axes")
    }
    axes: Any = tables.get("torch_axes")
    if isinstance(axes, list) and axes and all(isinstance(order, list) for order in axes):
        axes = tuple(_permutation(order, f"{path}: torch_axes") or None for order in axes)
    elif axes is not None:
        axes = _permutation(axes, f"{path}: torch_axes")
    return Given(tables.get("modules", {}), tables.get("weights", {}), orders["axes"], axes, orders["out_axes"])


def _permutation(order: Any, what: str) -> Axes:
    if not isinstance(order, list) or sorted(map(str, order)) != sorted(map(str, range(len(order)))):
        raise ValueError(f"{what} must be a permutation of 0, 1, …, as in [0, 3, 1, 2]; got {order!r}")
    return tuple(order)


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


def derive_names(
    torch_weights: Mapping[str, TorchLeaf],
    torch_modules: Collection[str],
    flax_weights: Mapping[str, tuple[int, ...]],
    flax_modules: Collection[str],
    given: Given,
    transposed: Collection[str] = (),
) -> Names:
    """Return the names of anybody's twins: as `given`, else by Flax's usual names of leaves and modules.

    A module's `name_3` is PyTorch's `name.3` if there is no `name_3`. What has no counterpart keeps its own name, and
    so is found missing.

    Args:
        torch_weights: by name.
        torch_modules: their paths.
        flax_weights: shapes by path, joined by ".".
        flax_modules: paths.
        given: what the user says.
        transposed: paths of Flax's transposed convolutions that are told to take the kernel as PyTorch does.

    Raises:
        ValueError: what the user says names something that is not there.
    """
    inner = {".".join(path[:n]) for path in (name.split(".") for name in flax_weights) for n in range(len(path))}
    _check_given(given, torch_weights, torch_modules, flax_weights, inner | set(flax_modules))
    modules = {path: _torch_path(path, torch_modules, given.modules) for path in {*flax_modules, *inner}}
    weights = [
        _of_attention(flax, shape, modules, torch_weights, given)
        or _by_name(flax, shape, modules, torch_weights, given, transposed)
        for flax, shape in flax_weights.items()
    ]
    found = {weight.torch for weight in weights}
    missing = [WeightName(name, f"(no counterpart of {name})") for name in torch_weights if name not in found]
    return Names([*weights, *missing], modules, _hints(weights, torch_weights, flax_weights))


def _by_name(
    flax: str,
    shape: tuple[int, ...],
    modules: Mapping[str, str],
    torch_weights: Mapping[str, TorchLeaf],
    given: Given,
    transposed: Collection[str],
) -> WeightName:
    owner, _, leaf = flax.rpartition(".")
    torch = given.weights.get(flax) or ".".join(filter(None, (modules[owner], LEAVES.get(leaf, leaf))))
    found = torch_weights.get(torch)
    if found is None:
        return WeightName(flax, flax, given.axes.get(flax))
    axes = given.axes.get(flax, KERNEL_AXES.get(found.kind) if torch.endswith("weight") else None)
    if flax in given.axes or axes is None or not found.kind.startswith("ConvTranspose"):
        return WeightName(torch, flax, axes)
    # Flax takes this kernel as that of a convolution, and so the other way round, unless it is told not to.
    turned = (*axes[:-2], axes[-1], axes[-2])
    as_in_torch = tuple(found.shape[axis] for axis in turned) == shape
    plain = owner in transposed or (as_in_torch and tuple(found.shape[axis] for axis in axes) != shape)
    return WeightName(torch, flax, turned) if plain else WeightName(torch, flax, axes, flipped=True)


def _of_attention(
    flax: str,
    shape: tuple[int, ...],
    modules: Mapping[str, str],
    torch_weights: Mapping[str, TorchLeaf],
    given: Given,
) -> WeightName | None:
    """Return the name of a weight of Flax's multi-head attention whose twin is PyTorch's, None of any other."""
    owner, _, leaf = flax.rpartition(".")
    attention, _, projection = owner.rpartition(".")
    path = modules.get(attention, attention)
    inside = {
        name for name, weight in torch_weights.items() if weight.kind == ATTENTION and name.rpartition(".")[0] == path
    }
    if flax in given.weights or not inside or leaf not in ("kernel", "bias"):
        return None
    prefix = f"{path}." if path else ""
    axes = (1, 0) if leaf == "kernel" else None
    if projection == "out":
        torch = f"{prefix}out_proj.{'weight' if leaf == 'kernel' else 'bias'}"
        return WeightName(torch, flax, axes, shape=shape) if torch in torch_weights else None
    if projection not in PROJECTIONS:
        return None
    apart = f"{prefix}{projection[0]}_proj_weight"
    if leaf == "kernel" and apart in inside:
        return WeightName(apart, flax, axes, shape=shape)
    fused = f"{prefix}{'in_proj_weight' if leaf == 'kernel' else 'in_proj_bias'}"
    part = (PROJECTIONS.index(projection), len(PROJECTIONS))
    return WeightName(fused, flax, axes, part, shape) if fused in inside else None


def _check_given(
    given: Given,
    torch_weights: Collection[str],
    torch_modules: Collection[str],
    flax_weights: Collection[str],
    flax_modules: Collection[str],
) -> None:
    for what, names, known in (
        ("modules, of JAX,", given.modules, flax_modules),
        ("modules, of torch,", given.modules.values(), torch_modules),
        ("weights, of JAX,", given.weights, flax_weights),
        ("weights, of torch,", given.weights.values(), torch_weights),
        ("axes, of JAX,", given.axes, flax_weights),
    ):
        there = sorted(filter(None, known))
        for name in names:
            if name not in known:
                near = get_close_matches(name, there, cutoff=0.5) or there[:8]
                listed = ", ".join(near) or "none"
                raise ValueError(f"the map's {what} name {name!r}, which is not there; of the {len(there)}: {listed}")


def _hints(
    weights: Collection[WeightName], torch_weights: Mapping[str, TorchLeaf], flax_weights: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """Return what could be said about weights without counterpart: those of the other twin of as many numbers."""
    found = {weight.torch for weight in weights}
    lonely = {weight.flax: flax_weights[weight.flax] for weight in weights if weight.torch not in torch_weights}
    others = {name: leaf for name, leaf in torch_weights.items() if name not in found}
    hints = {}
    for flax, shape in lonely.items():
        if alike := [name for name, leaf in others.items() if sorted(leaf.shape) == sorted(shape)]:
            hints[flax] = f'if that is one of {", ".join(alike[:3])}: "{flax}" = "{alike[0]}" below [weights] in --map'
    for name, leaf in others.items():
        alike = [flax for flax, shape in lonely.items() if sorted(leaf.shape) == sorted(shape)]
        if leaf.kind in NOT_MAPPED:
            hints[name] = NOT_MAPPED[leaf.kind]
        elif alike:
            hints[name] = f'if that is one of {", ".join(alike[:3])}: "{alike[0]}" = "{name}" below [weights] in --map'
    return hints


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
