"""Which names of anybody's twins correspond, by Flax's usual names and what the user says. Imports no framework."""

import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import NamedTuple

from outlook_common.text import listed
from outlook_parity.mapping.names import Axes, Names, WeightName, is_counter
from outlook_parity.mapping.user import NameMap

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


def derive_names(
    torch_weights: Mapping[str, TorchLeaf],
    torch_modules: Collection[str],
    flax_weights: Mapping[str, tuple[int, ...]],
    flax_modules: Collection[str],
    given: NameMap,
    transposed: Collection[str] = (),
) -> Names:
    """Return the names of anybody's twins: as `given`, else by Flax's usual names of leaves and modules.

    A module's `name_3` is PyTorch's `name.3` if there is no `name_3`. What has no counterpart keeps its own name, and
    so is found missing; but for PyTorch's counts of batches, which Flax's layers do not keep.

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
    expected = {name: leaf for name, leaf in torch_weights.items() if name in found or not is_counter(name)}
    missing = [WeightName(name, f"(no counterpart of {name})") for name in expected if name not in found]
    return Names([*weights, *missing], modules, _hints(weights, expected, flax_weights))


def usual_name(module: str, leaf: str) -> str:
    """Return what PyTorch calls a leaf of Flax in the module that PyTorch calls so."""
    return ".".join(filter(None, (module, LEAVES.get(leaf, leaf))))


def _by_name(
    flax: str,
    shape: tuple[int, ...],
    modules: Mapping[str, str],
    torch_weights: Mapping[str, TorchLeaf],
    given: NameMap,
    transposed: Collection[str],
) -> WeightName:
    owner, _, leaf = flax.rpartition(".")
    torch = given.weights.get(flax) or usual_name(modules[owner], leaf)
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
    given: NameMap,
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
    given: NameMap,
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
                near = listed(get_close_matches(name, there, cutoff=0.5) or there) or "none"
                raise ValueError(f"the map's {what} name {name!r}, which is not there; of the {len(there)}: {near}")


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
            hints[flax] = f'if that is one of {listed(alike, 3)}: "{flax}" = "{alike[0]}" below [weights] in --map'
    for name, leaf in others.items():
        alike = [flax for flax, shape in lonely.items() if sorted(leaf.shape) == sorted(shape)]
        if leaf.kind in NOT_MAPPED:
            hints[name] = NOT_MAPPED[leaf.kind]
        elif alike:
            hints[name] = f'if that is one of {listed(alike, 3)}: "{alike[0]}" = "{name}" below [weights] in --map'
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
