"""Which weights correspond, by names and structure: trees of modules aligned from the root. Imports no framework.

In each pair of modules that correspond, children are paired by name, by counter, by usual name, then by structure:
those whose weights have sizes that no others have, and of several alike, as many in either twin, by the order of
execution. What stays without counterpart is looked for among the children of containers that only one twin has, and at
last among equal weights. Two candidates that nothing tells apart are not paired.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from outlook_parity.mapping.layouts import Part
from outlook_parity.mapping.tree import Leaf, Node
from outlook_parity.mapping.usual import FUSED, part_name, tidy

How = Literal["map", "names", "structure", "values"]

# Module's path -> when it is first called.
Order = Mapping[str, int]

Nodes = list[Node]

Fits = Callable[[Leaf, Leaf], bool]

Equal = Callable[[Node, Node], bool]


@dataclass
class Aligned:
    """What was found.

    Attributes:
        pairs: weights of PyTorch and of JAX, and how they were found.
        modules: JAX's path -> PyTorch's.
        around: JAX's path of a container that only JAX has -> PyTorch's path of the module that it lies in.
        left: what has no counterpart, PyTorch's and JAX's.
    """

    pairs: list[tuple[Leaf, Leaf, How]] = field(default_factory=list)
    modules: dict[str, str] = field(default_factory=dict)
    around: dict[str, str] = field(default_factory=dict)
    left: tuple[Nodes, Nodes] = field(default_factory=lambda: ([], []))


def align(
    torch: Node,
    jax: Node,
    fits: Fits,
    order: Callable[[], tuple[Order, Order]] | None = None,
    equal: Equal | None = None,
) -> Aligned:
    """Return what corresponds below the roots of two trees.

    Args:
        torch: PyTorch's root.
        jax: JAX's.
        fits: whether two weights have shapes that correspond in a known layout.
        order: returns when each module is first called in either twin; asked only where names do not tell.
        equal: whether two modules have equal weights; None if that is unknown.
    """
    alignment = _Alignment(fits, order, equal)
    torch, jax = _without_wrappers(torch, jax), _without_wrappers(jax, torch)
    alignment.found.around[jax.path or ""] = torch.path or ""
    left = alignment.children(list(torch.children.values()), list(jax.children.values()), "names", torch.path)
    left = alignment.by_values(*left)
    alignment.found.left[0].extend(left[0])
    alignment.found.left[1].extend(left[1])
    return alignment.found


def _without_wrappers(node: Node, other: Node) -> Node:
    """Return the first module below that has several children, where the other twin's root has."""
    while len(other.children) > 1 and (child := _only(node)) is not None and not child.is_module:
        node = child
    return node


def _only(node: Node) -> Node | None:
    """Return the child of a node that has one, which is no weight."""
    child = next(iter(node.children.values())) if len(node.children) == 1 else None
    return None if child is None or child.leaf is not None else child


def _unwrapped(node: Node, until: Callable[[Node], bool]) -> Node:
    """Return the first below, of nodes that are alone in theirs, for which something holds; the node itself if none."""
    below: Node | None = node
    while below is not None and not until(below):
        below = _only(below)
    return node if below is None else below


def _as_many(node: Node) -> Callable[[Node], bool]:
    """Return whether a node has as many counters as this one."""
    return lambda other: other.is_numbered and len(other.children) == len(node.children)


def _bare(node: Node, other: Node) -> Node:
    """Return the weight of a module that has no other, where it may correspond to a weight of no such module."""
    if other.leaf is not None and node.is_module and len(node.children) == 1:
        return next(iter(node.children.values()))
    return node


class _Alignment:
    def __init__(self, fits: Fits, order: Callable[[], tuple[Order, Order]] | None, equal: Equal | None) -> None:
        self.found = Aligned()
        self._fits, self._make_order, self._equal = fits, order, equal
        self._orders: tuple[Order, Order] | None = None
        self._settled: set[int] = set()  # what lies in modules that have a counterpart

    def children(self, torch: Nodes, jax: Nodes, how: How, around: str | None) -> tuple[Nodes, Nodes]:
        """Pair two lists of children, and all below; return those without counterpart."""
        left: tuple[Nodes, Nodes] = ([], [])

        def pair(one: Node, other: Node, by: How) -> None:
            here = self._pair(one, other, by if how == "names" else how)
            left[0].extend(here[0])
            left[1].extend(here[1])

        counters = _rank_of(torch, jax)
        # Flax numbers layers as they are made, not as they run: only counters of containers of the same name are names.
        same = how == "names" and _counters(torch) == _counters(jax)
        for key in (_step, *([_number] if same else []), _tidy, _part_of):
            torch, jax = self._by_key(torch, jax, key, pair)
        torch, jax = self._fused(torch, jax, pair)
        torch, jax = self._stacked(torch, jax, how, left)
        torch, jax = self._by_sizes(torch, jax, pair)
        torch, jax = self._by_sizes(*self._by_key(torch, jax, counters, pair), pair)
        torch, jax = [*torch, *left[0]], [*jax, *left[1]]
        if torch and jax and any(node.leaf is None and not node.is_module for node in (*torch, *jax)):
            return self.children(self._flattened(torch, None), self._flattened(jax, around), how, around)
        return torch, jax

    def by_values(self, torch: Nodes, jax: Nodes) -> tuple[Nodes, Nodes]:
        """Pair what is left by equal weights, where each of a group has exactly one equal; return the rest."""
        if self._equal is None:
            return torch, jax
        for group_t, group_j in self._groups(torch, jax):
            if len(group_t) != len(group_j):
                continue
            equal = [[one for one in group_t if self._equal(one, other)] for other in group_j]
            if all(len(those) == 1 for those in equal) and len({id(those[0]) for those in equal}) == len(group_t):
                for other, (one,) in zip(group_j, equal, strict=True):
                    self._pair(one, other, "values")
                torch, jax = _without(torch, group_t), _without(jax, group_j)
        return torch, jax

    def _pair(self, torch: Node, jax: Node, how: How) -> tuple[Nodes, Nodes]:
        torch, jax = _bare(torch, jax), _bare(jax, torch)
        if torch.leaf is not None and jax.leaf is not None:
            self.found.pairs.append((torch.leaf, jax.leaf, how))
            return [], []
        self._name(torch, jax)
        inner = torch, jax
        for holds in _LEVELS:
            if holds(inner[0]) != holds(inner[1]):
                inner = _unwrapped(inner[0], holds), _unwrapped(inner[1], holds)
        if all(node.is_numbered for node in inner):
            # All layers may lie in the only chunk of a twin that cuts them into chunks.
            inner = _unwrapped(inner[0], _as_many(inner[1])), _unwrapped(inner[1], _as_many(inner[0]))
        if jax.path and torch.path is not None and inner[1] is not jax and inner[1].path:
            self.found.around.setdefault(inner[1].path, torch.path)
        torch, jax = inner
        if torch.is_module and jax.is_module:
            self._name(torch, jax)
        left = self.children(list(torch.children.values()), list(jax.children.values()), how, torch.path)
        if torch.is_module and jax.is_module:  # a weight that is missing here is not one of another module
            self.found.left[0].extend(left[0])
            self.found.left[1].extend(left[1])
            return [], []
        self._settled |= {id(node) for nodes in left for node in nodes}
        return left

    def _name(self, torch: Node, jax: Node) -> None:
        if jax.path is not None and torch.path is not None:
            self.found.modules.setdefault(jax.path, torch.path)

    def _apart(self, torch: Node, jax: Node) -> bool:
        """Whether both lie in modules that have other counterparts."""
        return id(torch) in self._settled and id(jax) in self._settled

    def _by_key(
        self, torch: Nodes, jax: Nodes, key: Callable[[Node], object], pair: Callable[[Node, Node, How], None]
    ) -> tuple[Nodes, Nodes]:
        """Pair nodes whose key is the same and no other's."""
        keys = [_unique(nodes, key) for nodes in (torch, jax)]
        both = [(one, keys[1][name]) for name, one in keys[0].items() if name in keys[1]]
        both = [(one, other) for one, other in both if self._alike(one, other)]
        for one, other in both:
            pair(one, other, "names")
        return _without(torch, [one for one, _ in both]), _without(jax, [other for _, other in both])

    def _alike(self, torch: Node, jax: Node) -> bool:
        """Whether both are weights, both modules of weights, or both containers of others."""
        torch, jax = _bare(torch, jax), _bare(jax, torch)
        if (torch.leaf is None) != (jax.leaf is None) or self._apart(torch, jax):
            return False
        if torch.leaf is not None or torch.is_module == jax.is_module:
            return not (torch.is_numbered != jax.is_numbered and self._stack_length(torch, jax))
        return torch.sizes() == jax.sizes()

    def _by_sizes(self, torch: Nodes, jax: Nodes, pair: Callable[[Node, Node, How], None]) -> tuple[Nodes, Nodes]:
        """Pair nodes by the sizes of their weights; of several alike, as many in either twin, by order."""
        for group_t, group_j in self._groups(torch, jax):
            if len(group_t) != len(group_j):
                continue
            if len(group_t) > 1:
                ordered = self._ordered(group_t, group_j)
                if ordered is None:
                    continue
                group_t, group_j = ordered
            if all(self._fit(one, other) for one, other in zip(group_t, group_j, strict=True)):
                for one, other in zip(group_t, group_j, strict=True):
                    pair(one, other, "structure")
                torch, jax = _without(torch, group_t), _without(jax, group_j)
        return torch, jax

    def _groups(self, torch: Nodes, jax: Nodes) -> list[tuple[Nodes, Nodes]]:
        """Return groups of nodes that may correspond: of equal sizes, and of layouts that are known."""
        groups: list[tuple[Nodes, Nodes]] = []
        for sizes in dict.fromkeys(node.sizes() for node in torch):
            ones = [node for node in torch if node.sizes() == sizes]
            others = [node for node in jax if node.sizes() == sizes]
            while ones:
                # Those that fit the same ones: an embedding is no kernel of the same size.
                fitting = [other for other in others if self._fit(ones[0], other)]
                group = [one for one in ones if [o for o in others if self._fit(one, o)] == fitting]
                ones = _without(ones, group)
                if fitting:
                    groups.append((group, fitting))
        return groups

    def _fit(self, torch: Node, jax: Node) -> bool:
        """Whether the weights of two nodes may correspond, each to one of equal size in a known layout."""
        if self._apart(torch, jax):
            return False
        torch, jax = _bare(torch, jax), _bare(jax, torch)
        if torch.leaf is not None or jax.leaf is not None:
            return torch.leaf is not None and jax.leaf is not None and self._fits(torch.leaf, jax.leaf)
        if torch.is_module and jax.is_module:
            shared = torch.children.keys() & jax.children.keys()
            return all(self._fit(torch.children[step], jax.children[step]) for step in shared)
        return True

    def _ordered(self, torch: Nodes, jax: Nodes) -> tuple[Nodes, Nodes] | None:
        """Return nodes in the order of execution, else of their counters; None if neither tells."""
        if self._orders is None and self._make_order is not None:
            self._orders = self._make_order()
        for keys in ([_first_call(order) for order in self._orders] if self._orders else []), [_counter, _counter]:
            if not keys:
                continue
            found = [[key(node) for node in nodes] for key, nodes in zip(keys, (torch, jax), strict=True)]
            if all(None not in ranks and len(set(ranks)) == len(ranks) for ranks in found):
                return sorted(torch, key=keys[0]), sorted(jax, key=keys[1])  # type: ignore[arg-type]
        return None

    def _fused(self, torch: Nodes, jax: Nodes, pair: Callable[[Node, Node, How], None]) -> tuple[Nodes, Nodes]:
        """Pair one projection with its parts, as query, key and value: the parts one after the other in PyTorch."""
        for whole, names in FUSED.items():
            for swapped in (False, True):
                ones, parts = (jax, torch) if swapped else (torch, jax)
                fused = [node for node in ones if part_name(node.step) == whole and node.is_module]
                named = _unique(parts, _part_of)
                if len(fused) != 1 or any(name not in named for name in names):
                    continue
                several = [named[name] for name in names]
                cut = _cut(fused[0], several, swapped)
                if cut is None:
                    continue
                for piece, one in zip(cut, several, strict=True):
                    pair(*((one, piece) if swapped else (piece, one)), "names")
                torch = _without(torch, several if swapped else fused)
                jax = _without(jax, fused if swapped else several)
        return torch, jax

    def _stacked(self, torch: Nodes, jax: Nodes, how: How, left: tuple[Nodes, Nodes]) -> tuple[Nodes, Nodes]:
        """Pair numbered layers of one twin with those of the other that are stacked along a first axis."""
        matches = [(one, other) for one in torch for other in jax if self._stack_length(one, other)]
        ones, others = (list({id(pair[i]): pair[i] for pair in matches}.values()) for i in (0, 1))
        if len(matches) > 1:
            ordered = self._ordered(ones, others) if len(ones) == len(others) else None
            named = [(one, other) for one, other in matches if part_name(one.step) == part_name(other.step)]
            mutual = len({id(one) for one, _ in named}) == len(named) == len({id(other) for _, other in named})
            if named and mutual:
                matches = named
            elif ordered is not None and all(self._stack_length(*pair) for pair in zip(*ordered, strict=True)):
                matches = list(zip(*ordered, strict=True))
            else:
                return torch, jax
        for one, other in matches:
            self._name(one, other)
            layers, stack = (one, other) if one.is_numbered else (other, one)
            length = len(layers.children)
            for index, layer in enumerate(sorted(layers.children.values(), key=lambda node: int(node.step))):
                piece = stack.part(Part(0, index, index + 1, length, dropped=True))
                here = self._pair(*((layer, piece) if one.is_numbered else (piece, layer)), how)
                left[0].extend(here[0])
                left[1].extend(here[1])
        return _without(torch, [one for one, _ in matches]), _without(jax, [other for _, other in matches])

    def _stack_length(self, torch: Node, jax: Node) -> int | None:
        """Return the number of layers if one node has them numbered, and the other has them stacked; else None."""
        for one, other in ((torch, jax), (jax, torch)):
            if not one.is_numbered or other.leaf is not None:
                continue
            sizes = {child.sizes() for child in one.children.values()}
            length = len(one.children)
            # Of weights that are fused in one twin, the sum.
            same = len(sizes) == 1 and sum(other.sizes()) == length * sum(next(iter(sizes)))
            if same and other.stacked() == length and not (other.is_numbered and len(other.children) == length):
                return length
        return None

    def _flattened(self, nodes: Nodes, around: str | None) -> Nodes:
        """Return nodes, containers replaced by their children."""
        flat: Nodes = []
        for node in nodes:
            if node.leaf is not None or node.is_module:
                flat.append(node)
                continue
            if around is not None and node.path:
                self.found.around.setdefault(node.path, around)
            flat += node.children.values()
        return flat


def _unique(nodes: Sequence[Node], key: Callable[[Node], object]) -> dict[object, Node]:
    """Return the nodes whose key no other has, by key."""
    keys = [key(node) for node in nodes]
    return {name: node for name, node in zip(keys, nodes, strict=True) if name is not None and keys.count(name) == 1}


def _without(nodes: Sequence[Node], others: Sequence[Node]) -> Nodes:
    ids = {id(node) for node in others}
    return [node for node in nodes if id(node) not in ids]


# What two nodes are alike in before their children are paired.
_LEVELS: tuple[Callable[[Node], bool], ...] = (lambda node: node.is_module, lambda node: node.is_numbered)


def _step(node: Node) -> str | None:
    return None if node.step.isdecimal() else node.step


def _tidy(node: Node) -> str | None:
    return None if node.step.isdecimal() else tidy(node.step)


def _part_of(node: Node) -> str | None:
    return None if node.step.isdecimal() else part_name(node.step)


def _counter(node: Node) -> int | None:
    """Return the number of a node; None of a layer that Linen has numbered, as it was made: `Dense_0` may run last."""
    made = node.is_module and re.fullmatch(r"[A-Z]\w*_\d+", (node.path or "").rpartition(".")[2])
    return int(node.step) if node.step.isdecimal() and not made else None


def _number(node: Node) -> int | None:
    return int(node.step) if node.step.isdecimal() else None


def _counters(nodes: Nodes) -> list[int]:
    return sorted(int(node.step) for node in nodes if node.step.isdecimal())


def _rank_of(torch: Nodes, jax: Nodes) -> Callable[[Node], int | None]:
    """Return a key for counters: their rank, where both twins have as many but count otherwise."""
    counters = [[int(node.step) for node in nodes if node.step.isdecimal()] for nodes in (torch, jax)]
    several = any(len(set(numbers)) < len(numbers) for numbers in counters)
    if several or any(_counter(node) is None for node in (*torch, *jax) if node.step.isdecimal()):
        return lambda node: None
    if len(counters[0]) != len(counters[1]):
        return _counter
    ranks = {
        id(node): sorted(numbers).index(int(node.step))
        for numbers, nodes in zip(counters, (torch, jax), strict=True)
        for node in nodes
        if node.step.isdecimal()
    }
    return lambda node: ranks.get(id(node))


def _first_call(order: Order) -> Callable[[Node], int | None]:
    def first(node: Node) -> int | None:
        own = order.get(node.path) if node.path is not None else None
        if own is not None:
            return own
        inner = [call for child in node.children.values() if (call := first(child)) is not None]
        return min(inner, default=None)

    return first


def _cut(fused: Node, parts: Sequence[Node], swapped: bool) -> list[Node] | None:
    """Return a fused projection cut into as many parts, None if that is not possible.

    PyTorch has the parts along the first axis of the weight, JAX along its last, or along an axis of their number.
    """
    cut: list[Node] = [Node(fused.step) for _ in parts]
    for step, child in fused.children.items():
        leaf = child.leaf
        sizes = [node.children[step].sizes()[0] for node in parts if step in node.children]
        if leaf is None or len(sizes) != len(parts) or not leaf.shape:
            return None
        axis = _cut_axis(leaf, len(parts), swapped)
        total, length = sum(sizes), leaf.shape[axis]
        if child.sizes()[0] != total or any(size * length % total for size in sizes):
            return None
        start = 0
        for node, size in zip(cut, sizes, strict=True):
            stop = start + size * length // total
            dropped = length == len(parts) and stop - start == 1 and len(leaf.shape) > 1
            node.children[step] = Node(step, None, {}, leaf.part(Part(axis, start, stop, length, dropped)))
            start = stop
    return cut


def _cut_axis(leaf: Leaf, count: int, in_jax: bool) -> int:
    """Return the axis along which a fused weight has its parts."""
    inner = [axis for axis, size in enumerate(leaf.shape) if size == count]
    if in_jax:
        if len(leaf.shape) > 2 or (len(leaf.shape) == 2 and leaf.name.rpartition(".")[2] == "bias"):
            return inner[0] if inner else len(leaf.shape) - 1
        return 0 if leaf.name.rpartition(".")[2] == "weight" else len(leaf.shape) - 1
    return len(leaf.shape) - 1 if leaf.kind == "Conv1D" else 0
