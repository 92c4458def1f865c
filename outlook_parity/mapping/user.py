"""The user's map of names and axes, in Python or as a TOML file. Imports no framework."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from outlook_common.text import closest
from outlook_parity.core.layout import Axes
from outlook_parity.mapping.entries import Entry
from outlook_parity.mapping.toml import entry_from_toml


@dataclass(frozen=True)
class NameMap:
    r"""The user's map of names and axes, where Flax's conventions do not tell.

    Attributes:
        modules: Flax path -> PyTorch path; what lies below goes with it. Paths may be regular expressions, with "." or
            "/" between steps: r"encoder/layer_(\d+)" -> r"encoder.\1".
        weights: Flax path, or expression -> PyTorch name, where the modules and usual names of leaves do not say it; or
            a `WeightEntry` with a layout; or several, the pieces of one array.
        axes: Flax path of a weight, or expression -> the order in which Flax has PyTorch's axes.
        torch_axes: the order in which PyTorch takes the axes of the inputs that have so many, None for the same as
            JAX; or one such order, or None, per input.
        out_axes: output, "output" or as in "output.logits" -> the order in which JAX has PyTorch's axes; needed only
            where the shapes leave a choice.
    """

    modules: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, Entry] = field(default_factory=dict)
    axes: Mapping[str, Axes] = field(default_factory=dict)
    torch_axes: Axes | Sequence[Axes | None] | None = None
    out_axes: Mapping[str, Axes] = field(default_factory=dict)


def torch_axes_of(name_map: NameMap, inputs: Mapping[str, np.ndarray], usual: Axes | None) -> dict[str, Axes]:
    """Return for each input the order in which PyTorch takes the axes: by the map, else `usual`, else the same.

    Raises:
        ValueError: the map's orders do not fit the inputs.
    """
    wanted = name_map.torch_axes if name_map.torch_axes is not None else usual
    same = {name: tuple(range(array.ndim)) for name, array in inputs.items()}
    if wanted is None:
        return same
    shapes = ", ".join(f"{name} {array.shape}" for name, array in inputs.items())
    if all(isinstance(axis, int) for axis in wanted):
        order: Axes = tuple(wanted)  # type: ignore[arg-type]
        if not any(len(order) == array.ndim for array in inputs.values()):
            raise ValueError(f"torch_axes={list(order)} has {len(order)} axes; no input has as many: {shapes}")
        orders = {name: order if len(axes) == len(order) else axes for name, axes in same.items()}
    elif len(wanted) != len(inputs):
        raise ValueError(f"torch_axes has {len(wanted)} orders of axes, there are {len(inputs)} inputs: {shapes}")
    else:
        orders = {
            name: same[name] if order is None else tuple(order)  # type: ignore[arg-type]
            for name, order in zip(inputs, wanted, strict=True)
        }
    for name, order in orders.items():
        if sorted(order) != list(same[name]):
            raise ValueError(f"torch_axes of {name}, of shape {inputs[name].shape}, must not be {list(order)}")
    return orders


def read_name_map(path: Path) -> NameMap:
    """Read a TOML file: the tables `modules`, `weights`, `axes` and `out_axes`, the array `torch_axes`; all optional.

    A weight is PyTorch's name, or a table of `name` and its layout in JAX (`split`, `permute`, `reshape`, `stack` and
    the others of `WeightEntry`), or a list of such tables.

    Raises:
        ValueError: it is no TOML, or has other entries, or entries of other types.
        OSError: it cannot be read.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error
    kinds: dict[str, Any] = {"modules": str, "weights": str | dict | list, "axes": list, "out_axes": list}
    known = [*kinds, "torch_axes"]
    for name, table in tables.items():
        if name == "torch_axes":
            continue
        if name not in kinds:
            close = closest(name, known)
            hint = f"; did you mean {close!r}?" if close else ""
            raise ValueError(f"{path}: {name!r} is none of {', '.join(known)}{hint}")
        if not isinstance(table, dict):
            raise ValueError(f"{path}: {name!r} must be a table, got {table!r}")
        for key, value in table.items():
            if not isinstance(value, kinds[name]):
                kind = getattr(kinds[name], "__name__", "string, a table or a list of tables")
                raise ValueError(f"{path}: {name}.{key!r} must be a {kind}, got {value!r}")
    orders = {
        kind: {name: permutation(order, f"{path}: {kind} of {name}") for name, order in tables.get(kind, {}).items()}
        for kind in ("axes", "out_axes")
    }
    weights = {
        name: entry_from_toml(value, f"{path}: weights.{name!r}") for name, value in tables.get("weights", {}).items()
    }
    axes: Any = tables.get("torch_axes")
    if isinstance(axes, list) and axes and all(isinstance(order, list) for order in axes):
        axes = tuple(permutation(order, f"{path}: torch_axes") or None for order in axes)
    elif axes is not None:
        axes = permutation(axes, f"{path}: torch_axes")
    return NameMap(tables.get("modules", {}), weights, orders["axes"], axes, orders["out_axes"])


def permutation(order: Any, what: str) -> Axes:
    """Return an order of axes as a tuple.

    Raises:
        ValueError: it is none of 0, 1, …; `what` says what it was to be.
    """
    ints = isinstance(order, list) and all(type(axis) is int for axis in order)  # no booleans
    if not ints or sorted(order) != list(range(len(order))):
        raise ValueError(f"{what} must be a permutation of 0, 1, …, as in [0, 3, 1, 2]; got {order!r}")
    return tuple(order)
