"""Infer which weights and modules correspond: by the map, names, structure and equal weights. Imports no framework."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import NamedTuple

from outlook_common.text import listed
from outlook_parity.mapping.attention import with_attention
from outlook_parity.mapping.entries import expanded
from outlook_parity.mapping.layouts import Shape
from outlook_parity.mapping.match import Layouts, may_correspond
from outlook_parity.mapping.names import Found, Names, WeightName, is_counter
from outlook_parity.mapping.structure import Aligned, Order, align
from outlook_parity.mapping.tied import names_as_in_jax
from outlook_parity.mapping.tree import Leaf, Node, tree_of
from outlook_parity.mapping.user import NameMap
from outlook_parity.mapping.usual import leaf_name
from outlook_parity.mapping.values import Weights, equal_under

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
    flax_weights: Mapping[str, Shape],
    flax_modules: Collection[str],
    name_map: NameMap,
    transposed: Collection[str] = (),
    *,
    order: Callable[[], tuple[Order, Order]] | None = None,
    values: tuple[Weights, Weights] | None = None,
    aliases: Mapping[str, str] | None = None,
) -> Names:
    """Return the names that correspond: by `name_map`, names, structure, and equal weights where those leave a choice.

    A weight without counterpart keeps its own name, and so is found missing; except PyTorch's counts of batches, which
    Flax's layers do not keep.

    Args:
        torch_weights: by name.
        torch_modules: their paths.
        flax_weights: shapes by path, joined by ".".
        flax_modules: paths.
        name_map: the user's map.
        transposed: paths of Flax's transposed convolutions with `transpose_kernel`, whose kernel is as in PyTorch.
        order: returns when each module is first called, in PyTorch and in JAX; asked only where names do not tell.
        values: return the weights of either twin by name; None where they are not to be compared.
        aliases: other names of tied weights -> those in `torch_weights`.

    Raises:
        ValueError: the map names something that does not exist.
    """
    inner = {".".join(path[:n]) for path in (name.split(".") for name in flax_weights) for n in range(len(path))}
    name_map, named, given = expanded(
        name_map, {n: leaf.shape for n, leaf in torch_weights.items()}, flax_weights, inner | set(flax_modules)
    )
    _check_map(name_map, named, torch_weights, torch_modules, flax_weights, inner | set(flax_modules))
    torch = {
        name: Leaf(name, leaf.shape, leaf.kind, owner=name.rpartition(".")[0]) for name, leaf in torch_weights.items()
    }
    flax = {name: Leaf(name, shape, owner=name.rpartition(".")[0]) for name, shape in flax_weights.items()}
    mapped = [(torch[name], flax[path]) for path, name in named.items()]
    settled = {weight.torch for weight in given} | {leaf.name for leaf, _ in mapped}
    counted = any(map(is_counter, flax))
    left = {n: leaf for n, leaf in torch.items() if n not in settled and (counted or not is_counter(n))}
    tied = names_as_in_jax(left, aliases or {}, flax)
    torch_tree = tree_of({tied.get(n, n): leaf for n, leaf in with_attention(left, flax).items()})
    settled = {weight.flax for weight in given} | {leaf.name for _, leaf in mapped}
    flax_tree = tree_of({_renamed(n, name_map.modules): leaf for n, leaf in flax.items() if n not in settled})
    found = _aligned(torch_tree, flax_tree, order, values, transposed)
    pairs = [(one, other) for one, other, _ in found.pairs] + mapped
    modules = _modules(found, inner | set(flax_modules), torch_modules, name_map)
    pairs += _of_same_name(pairs, given, torch, flax, modules)
    layouts = Layouts(pairs, transposed)
    weights = [*given]
    weights += [layouts.of(one, other, name_map.axes.get(other.name)) for one, other in pairs]
    paths = {weight.flax for weight in weights}
    taken = {weight.torch for weight in weights}
    weights += [_alone(name, name_map, taken) for name in flax if name not in paths]
    position = {name: index for index, name in enumerate(flax)}
    weights.sort(key=lambda weight: position[weight.flax])
    matched = {weight.torch for weight in weights}
    expected = {name: leaf for name, leaf in torch_weights.items() if name in matched or not is_counter(name)}
    missing = [WeightName(name, f"(no counterpart of {name})") for name in expected if name not in matched]
    hints = _hints(weights, expected, flax_weights)
    told = replace(
        _how(found, len(mapped) + len({weight.flax for weight in given}), weights, torch, flax),
        modules={path: name for path, name in modules.items() if path != name and path and name in set(torch_modules)},
    )
    return Names([*weights, *missing], modules, hints, told)


def _of_same_name(
    pairs: Collection[tuple[Leaf, Leaf]],
    given: Collection[WeightName],
    torch: Mapping[str, Leaf],
    flax: Mapping[str, Leaf],
    modules: Mapping[str, str],
) -> list[tuple[Leaf, Leaf]]:
    """Return weights that are left and have the same name, whatever their shapes."""
    taken = {one.name for one, _ in pairs} | {weight.torch for weight in given}
    found = {other.name for _, other in pairs} | {weight.flax for weight in given}
    named: dict[str, Leaf] = {}
    for name, leaf in flax.items():
        owner, _, last = name.rpartition(".")
        usual = usual_name(modules.get(owner, owner), last)
        if name not in found and usual in torch and usual not in taken:
            named.setdefault(usual, leaf)
    return [(torch[name], leaf) for name, leaf in named.items()]


def _alone(flax: str, name_map: NameMap, taken: Collection[str]) -> WeightName:
    """Return a name for a weight of Flax without counterpart that no weight of PyTorch has."""
    return WeightName(f"(no counterpart of {flax})" if flax in taken else flax, flax, name_map.axes.get(flax))


def _aligned(
    torch: Node,
    flax: Node,
    order: Callable[[], tuple[Order, Order]] | None,
    values: tuple[Weights, Weights] | None,
    transposed: Collection[str],
) -> Aligned:
    if not (torch.children and flax.children):
        return Aligned()
    return align(torch, flax, may_correspond, order, None if values is None else equal_under(*values, transposed))


def _how(
    found: Aligned, by_map: int, weights: Collection[WeightName], torch: Mapping[str, Leaf], flax: Mapping[str, Leaf]
) -> Found:
    """Return how many weights of Flax were found by what, and what the rest may be."""
    hows = list({other.name: how for _, other, how in found.pairs}.values())
    counts = {"map": by_map, **{how: hows.count(how) for how in ("names", "structure", "values")}}
    matched = {weight.torch for weight in weights}
    left = [name for name in torch if name not in matched]
    alone = [weight.flax for weight in weights if weight.torch not in torch]
    return Found(counts, {name: [n for n in left if may_correspond(torch[n], flax[name])] for name in alone}, left)


def _renamed(flax: str, modules: Mapping[str, str]) -> str:
    """Return a path with the longest of its modules that the map names under PyTorch's name."""
    steps = flax.split(".")
    for length in range(len(steps) - 1, 0, -1):
        prefix = ".".join(steps[:length])
        if prefix in modules:
            return ".".join(filter(None, (modules[prefix], *steps[length:])))
    return flax


def _modules(
    found: Aligned, flax_modules: Collection[str], torch_modules: Collection[str], name_map: NameMap
) -> dict[str, str]:
    """Return PyTorch's path of each module of Flax: as its weights', else as that of the module that it lies in."""
    exact = {**found.modules, **name_map.modules}
    around = {**found.around, **exact}
    modules: dict[str, str] = {}
    taken = set(exact.values())
    for path in sorted(flax_modules, key=lambda path: (path.count("."), path)):
        if path in exact or path == "":
            modules[path] = exact.get(path, "")
            continue
        torch = _torch_path(path, torch_modules, around)
        # A container that only Flax has is not the module that it lies in.
        modules[path] = path if torch in taken and path in around else torch
    return modules


def usual_name(module: str, leaf: str) -> str:
    """Return PyTorch's usual name for a leaf of Flax in this module of PyTorch."""
    return ".".join(filter(None, (module, leaf_name(leaf))))


def _check_map(
    name_map: NameMap,
    weights: Mapping[str, str],
    torch_weights: Collection[str],
    torch_modules: Collection[str],
    flax_weights: Collection[str],
    flax_modules: Collection[str],
) -> None:
    for what, names, known in (
        ("modules, of JAX,", name_map.modules, flax_modules),
        ("modules, of torch,", name_map.modules.values(), torch_modules),
        ("weights, of JAX,", weights, flax_weights),
        ("weights, of torch,", weights.values(), torch_weights),
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
