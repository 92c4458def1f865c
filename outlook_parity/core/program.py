"""The operations that a model computes, in words shared by both frameworks. Imports no framework.

`backends/torch/program.py` and `backends/jax/program.py` trace them; `diagnose/` reads them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

# Kinds of nodes that are no operations: where numbers come from.
PARAMETER, INPUT, CONSTANT = "parameter", "input", "constant"
LEAVES = (PARAMETER, INPUT, CONSTANT)

# Kinds of operations that move numbers and change none.
LAYOUT = "layout"
CAST = "cast"


@dataclass(eq=False)
class Node:
    """One operation, or a leaf.

    Attributes:
        kind: the word for it: "add", "dot", "softmax" …; unknown ones under their framework's name.
        path: of the module whose code it is.
        operands: what it is computed of.
        shape: of its result.
        dtype: of its result.
        settings: axes, eps and such.
        compute: returns the result, or None where it cannot be had. What products of matrices give may be random
            numbers: those tell masks, tables and orders as well.
    """

    kind: str
    path: str
    operands: Sequence["Node"] = ()
    shape: tuple[int, ...] = ()
    dtype: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    compute: Callable[[], Any] = lambda: None

    @cached_property
    def constant(self) -> bool:
        """Whether it depends on neither inputs nor parameters."""
        if self.kind in LEAVES:
            return self.kind == CONSTANT
        return all(operand.constant for operand in self.operands)

    @cached_property
    def value(self) -> np.ndarray | None:
        """The result as an array, None if it cannot be had."""
        result = self.compute()
        return None if result is None else np.asarray(result)

    @cached_property
    def number(self) -> float | None:
        """The one number that a constant consists of, None for anything else."""
        if not self.constant:
            return None
        value = self.value
        if value is None or value.size == 0 or value.dtype.kind not in "fiub":
            return None
        first = float(value.flat[0])
        return first if value.size == 1 or bool((value == value.flat[0]).all()) else None

    @property
    def floating(self) -> bool:
        """Whether its result is of real floating-point numbers."""
        return "float" in self.dtype


def through(node: Node, kinds: Sequence[str] = (LAYOUT, CAST)) -> Node:
    """Return what a node shows of, beneath operations of these kinds."""
    while node.kind in kinds and node.operands:
        node = node.operands[0]
    return node


@dataclass
class Program:
    """All operations of one run, in order."""

    nodes: list[Node] = field(default_factory=list)

    def by_module(self, shared: set[str]) -> dict[str, list[Node]]:
        """Return the operations by module; those of modules that are not shared count for the module around."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            path = node.path
            while path and path not in shared:
                path = path.rpartition(".")[0]
            found.setdefault(path, []).append(node)
        return found
