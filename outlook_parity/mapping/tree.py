"""The weights of one twin as a tree of modules. Imports no framework."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from outlook_parity.mapping.layouts import Part, Parts, Shape
from outlook_parity.mapping.usual import leaf_name, steps_of

# The child that a module is beside its numbered ones, as Keras' `dense` beside `dense_1`.
ITSELF = "0"


@dataclass(frozen=True)
class Leaf:
    """A weight, or a part of one.

    Attributes:
        name: of the whole weight.
        shape: of this part.
        kind: the type of the module that has it, "" if unknown.
        parts: which part it is; () for all of it.
        owner: the path of that module; None if no module has it and its siblings alone.
    """

    name: str
    shape: Shape
    kind: str = ""
    parts: Parts = ()
    owner: str | None = None

    def part(self, part: Part) -> "Leaf":
        """Return a part of it."""
        return replace(self, shape=part.shape(self.shape), parts=(*self.parts, part))


@dataclass
class Node:
    """A module, a container, a counter or a weight.

    Attributes:
        step: its name in the module around it; of a weight PyTorch's usual name.
        path: of the module; None where there is no such path, as of `blocks` in "blocks_0".
        children: by step.
        leaf: of a weight.
    """

    step: str
    path: str | None = None
    children: dict[str, "Node"] = field(default_factory=dict)
    leaf: Leaf | None = None

    def leaves(self) -> Iterator[Leaf]:
        """Return the weights below, in their order."""
        if self.leaf is not None:
            yield self.leaf
        for child in self.children.values():
            yield from child.leaves()

    @property
    def is_module(self) -> bool:
        """Whether it has weights and nothing else."""
        return bool(self.children) and all(child.leaf is not None for child in self.children.values())

    @property
    def is_numbered(self) -> bool:
        """Whether it has counters and nothing else."""
        return bool(self.children) and all(step.isdecimal() for step in self.children)

    def sizes(self) -> tuple[int, ...]:
        """Return how many numbers each weight below has, the largest last: whatever the layout."""
        return tuple(sorted(math.prod(leaf.shape) for leaf in self.leaves()))

    def part(self, part: Part) -> "Node":
        """Return the same tree with a part of each weight: the layer of a stack; its modules have no paths."""
        leaf = None if self.leaf is None else self.leaf.part(part)
        return Node(self.step, None, {step: child.part(part) for step, child in self.children.items()}, leaf)

    def stacked(self) -> int | None:
        """Return the length that the first axis of each weight has, None if that differs."""
        lengths = {leaf.shape[0] if leaf.shape else None for leaf in self.leaves()}
        return lengths.pop() if len(lengths) == 1 else None


def tree_of(weights: Mapping[str, Leaf]) -> Node:
    """Return the tree of weights by the names that they are to have in it."""
    root = Node("", "")
    for name, leaf in weights.items():
        _add(root, name, leaf)
    _move_beside_counters(root)
    return root


def _add(root: Node, name: str, leaf: Leaf) -> None:
    *owner, last = steps_of(name)
    node = root
    for step in owner:
        node = node.children.setdefault(step, Node(step))
    node.path = leaf.owner if node.path is None else node.path
    step = leaf_name(last)
    node.children[last if step in node.children else step] = Node(step, None, {}, leaf)
    # The containers around have paths where the name has the same steps.
    node, plain = root, leaf.owner.split(".") if leaf.owner else []
    for position, step in enumerate(owner):
        node = node.children[step]
        if node.path is None and owner[: position + 1] == plain[: position + 1]:
            node.path = ".".join(plain[: position + 1])


def _move_beside_counters(node: Node) -> None:
    """Make `dense` beside `dense_1` its number 0."""
    counters = {step for step in node.children if step.isdecimal()}
    if counters and len(counters) < len(node.children) and ITSELF not in counters and node.path is not None:
        rest = {step: child for step, child in node.children.items() if step not in counters}
        if all(child.leaf is not None for child in rest.values()):
            numbered = {step: node.children[step] for step in node.children if step in counters}
            node.children = {ITSELF: Node(ITSELF, node.path, rest), **numbered}
            node.path = None
    for child in node.children.values():
        _move_beside_counters(child)
