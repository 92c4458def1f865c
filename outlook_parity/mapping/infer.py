"""Infer which names correspond, by Flax's conventions and the user's map. Imports no framework."""

import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import NamedTuple

from outlook_common.text import listed
from outlook_parity.core.layout import Axes
from outlook_parity.mapping.names import Names, WeightName, is_counter
from outlook_parity.mapping.user import NameMap

# Flax's usual names of leaves -> PyTorch's.
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "mean": "running_mean", "var": "running_var"}

# Type of PyTorch's module -> the order in which Flax has the axes of its `weight`; of any other the same.
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

# Layers whose weights Flax has in another form.
NOT_MAPPED = {
    kind: f"Flax's cells have other weights than PyTorch's {kind}: one bias where it has two, one weight per gate; "
    "write the twin with PyTorch's own weights (weight_ih_l0, …) as parameters of these names"
    for kind in ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
}


class TorchLeaf(NamedTuple):
    """A weight in PyTorch: the type of the module that has it, and its shape."""

    kind: str
    shape: tuple[int, ...]


def derive_names(
    torch_weights: Mapping[str, TorchLeaf],
    torch_modules: Collection[str],
    flax_weights: Mapping[str, tuple[int, ...]],
    flax_modules: Collection[str],
    name_map: NameMap,
    transposed: Collection[str] = (),
) -> Names:
    """Return the names that correspond: by `name_map`, else by Flax's usual names of leaves and modules.

    A module's `name_3` is PyTorch's `name.3` if there is no `name_3`. A weight without counterpart keeps its own name,
    and so is found missing; except PyTorch's counts of batches, which Flax's layers do not keep.

    Args:
        torch_weights: by name.
        torch_modules: their paths.
        flax_weights: shapes by path, joined by ".".
        flax_modules: paths.
        name_map: the user's map.
        transposed: paths of Flax's transposed convolutions with `transpose_kernel`, whose kernel is as in PyTorch.

    Raises:
        ValueError: the map names something that does not exist.
    """
    inner = {".".join(path[:n]) for path in (name.split(".") for name in flax_weights) for n in range(len(path))}
    _check_map(name_map, torch_weights, torch_modules, flax_weights, inner | set(flax_modules))
    modules = {path: _torch_path(path, torch_modules, name_map.modules) for path in {*flax_modules, *inner}}
    weights = [
        _of_attention(flax, shape, modules, torch_weights, name_map)
        or _by_name(flax, shape, modules, torch_weights, name_map, transposed)
        for flax, shape in flax_weights.items()
    ]
    found = {weight.torch for weight in weights}
    expected = {name: leaf for name, leaf in torch_weights.items() if name in found or not is_counter(name)}
    missing = [WeightName(name, f"(no counterpart of {name})") for name in expected if name not in found]
    return Names([*weights, *missing], modules, _hints(weights, expected, flax_weights))


def usual_name(module: str, leaf: str) -> str:
    """Return PyTorch's usual name for a leaf of Flax in this module of PyTorch."""
    return ".".join(filter(None, (module, LEAVES.get(leaf, leaf))))


def _by_name(
    flax: str,
    shape: tuple[int, ...],
    modules: Mapping[str, str],
    torch_weights: Mapping[str, TorchLeaf],
    name_map: NameMap,
    transposed: Collection[str],
) -> WeightName:
    owner, _, leaf = flax.rpartition(".")
    torch = name_map.weights.get(flax) or usual_name(modules[owner], leaf)
    found = torch_weights.get(torch)
    if found is None:
        return WeightName(flax, flax, name_map.axes.get(flax))
    axes = name_map.axes.get(flax, KERNEL_AXES.get(found.kind) if torch.endswith("weight") else None)
    if flax in name_map.axes or axes is None or not found.kind.startswith("ConvTranspose"):
        return WeightName(torch, flax, axes)
    # Flax takes this kernel as that of a convolution, so flipped, unless it has `transpose_kernel`.
    turned = (*axes[:-2], axes[-1], axes[-2])
    as_in_torch = tuple(found.shape[axis] for axis in turned) == shape
    plain = owner in transposed or (as_in_torch and tuple(found.shape[axis] for axis in axes) != shape)
    return WeightName(torch, flax, turned) if plain else WeightName(torch, flax, axes, flipped=True)


def _of_attention(
    flax: str,
    shape: tuple[int, ...],
    modules: Mapping[str, str],
    torch_weights: Mapping[str, TorchLeaf],
    name_map: NameMap,
) -> WeightName | None:
    """Return the name of a weight of Flax's multi-head attention, where PyTorch's twin is its own; else None."""
    owner, _, leaf = flax.rpartition(".")
    attention, _, projection = owner.rpartition(".")
    path = modules.get(attention, attention)
    inside = {
        name for name, weight in torch_weights.items() if weight.kind == ATTENTION and name.rpartition(".")[0] == path
    }
    if flax in name_map.weights or not inside or leaf not in ("kernel", "bias"):
        return None
    prefix = f"{path}." if path else ""
    axes = (1, 0) if leaf == "kernel" else None
    if projection == "out":
        torch = f"{prefix}out_proj.{'weight' if leaf == 'kernel' else 'bias'}"
        return WeightName(torch, flax, axes, shape=shape) if torch in torch_weights else None
    if projection not in PROJECTIONS:
        return None
    separate = f"{prefix}{projection[0]}_proj_weight"
    if leaf == "kernel" and separate in inside:
        return WeightName(separate, flax, axes, shape=shape)
    fused = f"{prefix}{'in_proj_weight' if leaf == 'kernel' else 'in_proj_bias'}"
    part = (PROJECTIONS.index(projection), len(PROJECTIONS))
    return WeightName(fused, flax, axes, part, shape) if fused in inside else None


def _check_map(
    name_map: NameMap,
    torch_weights: Collection[str],
    torch_modules: Collection[str],
    flax_weights: Collection[str],
    flax_modules: Collection[str],
) -> None:
    for what, names, known in (
        ("modules, of JAX,", name_map.modules, flax_modules),
        ("modules, of torch,", name_map.modules.values(), torch_modules),
        ("weights, of JAX,", name_map.weights, flax_weights),
        ("weights, of torch,", name_map.weights.values(), torch_weights),
        ("axes, of JAX,", name_map.axes, flax_weights),
    ):
        there = sorted(filter(None, known))
        for name in names:
            if name not in known:
                near = listed(get_close_matches(name, there, cutoff=0.5) or there) or "none"
                raise ValueError(f"the map's {what} name {name!r}, which is not there; of the {len(there)}: {near}")


def _hints(
    weights: Collection[WeightName], torch_weights: Mapping[str, TorchLeaf], flax_weights: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """Return hints for weights without counterpart: those of the other twin with the same sizes of axes."""
    found = {weight.torch for weight in weights}
    unmatched = {weight.flax: flax_weights[weight.flax] for weight in weights if weight.torch not in torch_weights}
    others = {name: leaf for name, leaf in torch_weights.items() if name not in found}
    hints = {}
    for flax, shape in unmatched.items():
        if alike := [name for name, leaf in others.items() if sorted(leaf.shape) == sorted(shape)]:
            hints[flax] = f'if that is one of {listed(alike, 3)}: "{flax}" = "{alike[0]}" below [weights] in --map'
    for name, leaf in others.items():
        alike = [flax for flax, shape in unmatched.items() if sorted(leaf.shape) == sorted(shape)]
        if leaf.kind in NOT_MAPPED:
            hints[name] = NOT_MAPPED[leaf.kind]
        elif alike:
            hints[name] = f'if that is one of {listed(alike, 3)}: "{alike[0]}" = "{name}" below [weights] in --map'
    return hints


def _torch_path(flax: str, torch_modules: Collection[str], mapped: Mapping[str, str]) -> str:
    steps = flax.split(".") if flax else []
    for length in range(len(steps), 0, -1):
        prefix = ".".join(steps[:length])
        if prefix in mapped:
            return ".".join(filter(None, (mapped[prefix], _numbered(steps[length:], mapped[prefix], torch_modules))))
    return _numbered(steps, "", torch_modules)


def _numbered(steps: list[str], prefix: str, torch_modules: Collection[str]) -> str:
    """Return the path below `prefix` with `name_3` as `name.3` where PyTorch has only that."""
    path: list[str] = []
    for step in steps:
        here = ".".join(filter(None, (prefix, *path, step)))
        split = re.sub(r"_(\d+)$", r".\1", step)
        dotted = ".".join(filter(None, (prefix, *path, split)))
        path.append(split if here not in torch_modules and dotted in torch_modules else step)
    return ".".join(path)
