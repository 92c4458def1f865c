"""Equal weights under the known layout, to break ties that names and structure leave. Imports no framework."""

from collections.abc import Callable, Collection

import numpy as np

from outlook_parity.mapping.layouts import part_of
from outlook_parity.mapping.match import Layouts
from outlook_parity.mapping.tree import Leaf, Node

# Returns a weight by its name.
Weights = Callable[[str], np.ndarray]


def equal_under(torch: Weights, jax: Weights, transposed: Collection[str]) -> Callable[[Node, Node], bool]:
    """Return whether two modules, or two weights, have equal numbers in the usual layout."""

    def equal_leaves(one: Leaf, other: Leaf) -> bool:
        weight = Layouts([(one, other)], transposed).of(one, other)
        array = weight.to_flax(torch(one.name))
        theirs = part_of(jax(other.name), other.parts)
        return array.shape == theirs.shape and bool(np.array_equal(array, theirs))

    def equal(one: Node, other: Node) -> bool:
        if one.leaf is not None or other.leaf is not None:
            return one.leaf is not None and other.leaf is not None and equal_leaves(one.leaf, other.leaf)
        same = one.children.keys() == other.children.keys()
        return same and all(equal(child, other.children[step]) for step, child in one.children.items())

    return equal
