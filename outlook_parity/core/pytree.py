"""Arguments and results as models have them, in containers of any depth: their leaves by name. Imports no framework.

Containers are tuples, named tuples, lists, mappings and dataclasses; mappings in the order of their keys, so that twins
that fill them in another order are compared alike. None is no leaf.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

LeafTest = Callable[[Any], bool]


def members(tree: Any) -> list[tuple[str, Any]] | None:
    """Return what a container holds, by name; None if it is no container."""
    if isinstance(tree, Mapping):
        return [(str(key), tree[key]) for key in sorted(tree, key=str)]
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return list(zip(tree._fields, tree, strict=True))
    if isinstance(tree, list | tuple):
        return [(str(index), item) for index, item in enumerate(tree)]
    if is_dataclass(tree) and not isinstance(tree, type):
        return [(field.name, getattr(tree, field.name)) for field in fields(tree)]
    return None


def named_leaves(tree: Any, is_leaf: LeafTest, name: str) -> dict[str, Any]:
    """Return the leaves by path below `name`, as in "output.logits.0"; the tree itself if it is one.

    Raises:
        TypeError: something is neither a container, nor a leaf, nor None.
    """
    if tree is None:
        return {}
    if is_leaf(tree):
        return {name: tree}
    inner = members(tree)
    if inner is None:
        raise TypeError(f"{name} is a {type(tree).__name__}, which holds no arrays that could be compared")
    found: dict[str, Any] = {}
    for key, item in inner:
        found |= named_leaves(item, is_leaf, f"{name}.{key}")
    return found


def leaves(tree: Any, is_leaf: LeafTest) -> Iterator[Any]:
    """Return the leaves, each once if it is there several times, as the x of attention(x, x, x); all else left out."""
    seen: set[int] = set()
    for leaf in _all_leaves(tree, is_leaf):
        if id(leaf) not in seen:
            seen.add(id(leaf))
            yield leaf


def _all_leaves(tree: Any, is_leaf: LeafTest) -> Iterator[Any]:
    if is_leaf(tree):
        yield tree
        return
    for _, item in members(tree) or ():
        yield from _all_leaves(item, is_leaf)


def replaced(tree: Any, is_leaf: LeafTest, new: Mapping[int, Any]) -> Any:
    """Return a copy of the tree with `new[id(leaf)]` for each leaf."""
    if is_leaf(tree):
        return new[id(tree)]
    inner = members(tree)
    if inner is None or not any(True for _ in _all_leaves(tree, is_leaf)):
        return tree
    if isinstance(tree, Mapping):
        items = {key: replaced(tree[key], is_leaf, new) for key in tree}
        if not isinstance(tree, dict):
            return type(tree)(items)  # type: ignore[call-arg]
        changed: Any = copy.copy(tree)
        for key, item in items.items():
            changed[key] = item
        return changed
    values = [replaced(item, is_leaf, new) for _, item in inner]
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*values)
    if isinstance(tree, list | tuple):
        return type(tree)(values)
    changed = copy.copy(tree)
    for (name, _), value in zip(inner, values, strict=True):
        object.__setattr__(changed, name, value)
    return changed
