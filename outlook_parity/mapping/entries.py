"""Entries of the user's map: regular expressions and layouts. Imports no framework."""

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from outlook_parity.core.layout import Axes
from outlook_parity.mapping.layouts import Part, Parts, Shape, permuted
from outlook_parity.mapping.names import WeightName

if TYPE_CHECKING:
    from outlook_parity.mapping.user import NameMap

# A cut of an axis: (axis, index), which drops it, or (axis, start, stop).
Cut = tuple[int, ...]

# In the name of a weight: the number of the layer of a stack.
LAYER = "#"


@dataclass(frozen=True)
class WeightEntry:
    """A weight of PyTorch and its layout in JAX, for `NameMap.weights`.

    From PyTorch to JAX: cut, permute, flip, reshape, and placed into JAX's array.

    Attributes:
        name: its name in PyTorch; in a stack with "#" for the number of the layer.
        split: (k, n) for the k-th of n equal parts of PyTorch's first axis, (k, n, axis) of another.
        cuts: of PyTorch's array, more general than `split`.
        permute: the order in which JAX has the axes.
        reshape: the shape in JAX.
        flip: whether all axes but the last two are reversed.
        stack: the number of layers that JAX has stacked along its first axis.
        into: of JAX's array, the part that this is.
    """

    name: str
    split: tuple[int, ...] | None = None
    cuts: tuple[Cut, ...] = ()
    permute: Axes | None = None
    reshape: Shape | None = None
    flip: bool = False
    stack: int | None = None
    into: tuple[Cut, ...] = ()


Entry = str | WeightEntry | Sequence[WeightEntry]


def is_expression(name: str) -> bool:
    """Whether the name of a map is a regular expression: it has a sign that no path has."""
    return any(sign in name for sign in "\\()[]*+^$|?{}")


def matches(pattern: str, names: Collection[str]) -> Iterator[tuple[str, re.Match[str]]]:
    """Return the names that a regular expression matches whole, with "." or "/" between their steps.

    Raises:
        ValueError: it is none.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"the map's {pattern!r} is no regular expression: {error}") from error
    for name in names:
        match = compiled.fullmatch(name) or compiled.fullmatch(name.replace(".", "/"))
        if match is not None:
            yield name, match


def filled(template: str, match: re.Match[str] | None) -> str:
    r"""Return a name of the map with \1 … replaced, steps joined by ".".

    Raises:
        ValueError: it has another group than the expression.
    """
    if match is None:
        return template
    try:
        return match.expand(template).replace("/", ".")
    except (re.error, IndexError) as error:
        raise ValueError(f"the map's {template!r} does not fit {match.re.pattern!r}: {error}") from error


def by_expression(table: Mapping[str, Any], known: Collection[str]) -> Iterator[tuple[str, re.Match[str] | None, Any]]:
    """Return the entries of a table by the names that they are for: names as they are before expressions.

    Raises:
        ValueError: an expression matches no name.
    """
    plain = {name: value for name, value in table.items() if name in known or not is_expression(name)}
    for name, value in plain.items():
        yield name, None, value
    seen = set(plain)
    for pattern, value in table.items():
        if pattern in plain:
            continue
        found = list(matches(pattern, known))
        if not found:
            raise ValueError(f"the map's expression {pattern!r} matches none of the {len(known)} names of JAX")
        for name, match in found:
            if name not in seen:
                seen.add(name)
                yield name, match, value


def weights_of_entry(
    flax: str, shape: Shape, entry: WeightEntry, match: re.Match[str] | None, torch: Mapping[str, Shape]
) -> Iterator[WeightName]:
    """Return the names and layouts of an entry for one weight of JAX, several of a stack.

    Raises:
        ValueError: the weight is not there, or has another shape.
    """
    layers = [None] if entry.stack is None else list(range(entry.stack))
    for layer in layers:
        name = filled(entry.name, match)
        pieces = _parts(entry.into, shape, flax)
        if layer is not None:
            name = name.replace(LAYER, str(layer))
            if not shape or shape[0] != entry.stack:
                raise ValueError(f"the map's {flax!r}, of shape {shape}, is no stack of {entry.stack}")
            pieces = (Part(0, layer, layer + 1, shape[0], dropped=True), *pieces)
        if name not in torch:
            raise ValueError(f"the map's weights, of torch, name {name!r}, which is not there")
        cuts = entry.cuts
        if entry.split is not None:
            index, count, axis = (*entry.split, 0)[:3]
            if axis >= len(torch[name]) or not 0 <= index < count or torch[name][axis] % count:
                raise ValueError(f"the map's split {list(entry.split)} does not fit {name!r}, of shape {torch[name]}")
            length = torch[name][axis] // count
            cuts = ((axis, index * length, (index + 1) * length), *cuts)
        parts = _parts(cuts, torch[name], name)
        here, there = _cut(torch[name], parts), _cut(shape, pieces)
        if entry.permute is not None and len(entry.permute) != len(here):
            raise ValueError(f"the map's permute {list(entry.permute)} of {flax!r} does not fit shape {here}")
        turned = permuted(here, entry.permute)
        new = entry.reshape or turned
        if math.prod(new) != math.prod(turned) or new != there:
            raise ValueError(f"the map gives {flax!r} from {name!r} the shape {new}; JAX has {there}")
        yield WeightName(name, flax, entry.permute, parts, (turned, new) if new != turned else None, entry.flip, pieces)


def _parts(cuts: Sequence[Cut], shape: Shape, name: str) -> Parts:
    parts: list[Part] = []
    for axis, start, *stop in cuts:
        if axis >= len(shape) or not 0 <= start < (stop[0] if stop else start + 1) <= shape[axis]:
            raise ValueError(f"the map's cut {[axis, start, *stop]} does not fit {name!r}, there of shape {shape}")
        parts.append(Part(axis, start, stop[0] if stop else start + 1, shape[axis], dropped=not stop))
        shape = parts[-1].shape(shape)
    return tuple(parts)


def _cut(shape: Shape, parts: Parts) -> Shape:
    for part in parts:
        shape = part.shape(shape)
    return shape


def entry_of(weight: WeightName) -> WeightEntry:
    """Return the entry that gives this correspondence."""
    cuts, into = (
        tuple((p.axis, p.start) if p.dropped else (p.axis, p.start, p.stop) for p in parts)
        for parts in (weight.parts, weight.pieces)
    )
    reshape = weight.reshaped[1] if weight.reshaped else None
    return WeightEntry(weight.torch, None, cuts, weight.axes, reshape, weight.flipped, None, into)


def expanded(
    name_map: "NameMap", torch: Mapping[str, Shape], flax: Mapping[str, Shape], modules: Collection[str]
) -> tuple["NameMap", dict[str, str], list[WeightName]]:
    """Return a map without regular expressions, its names of weights, and the weights that have a layout in it.

    Raises:
        ValueError: an expression or a layout does not fit.
    """
    weights: dict[str, str] = {}
    given: list[WeightName] = []
    for name, match, value in by_expression(name_map.weights, flax):
        if isinstance(value, str):
            weights[name] = filled(value, match)
            continue
        entries: list[WeightEntry] = [value] if isinstance(value, WeightEntry) else list(value)
        if name not in flax:
            weights[name] = entries[0].name  # which the map's check refuses
            continue
        for entry in entries:
            given += weights_of_entry(name, flax[name], entry, match, torch)
    mapped = {name: filled(value, match) for name, match, value in by_expression(name_map.modules, modules)}
    axes = {name: value for name, _, value in by_expression(name_map.axes, flax)}
    return replace(name_map, modules=mapped, weights=weights, axes=axes), weights, given
