"""How the programs of twins differ in one module. Imports no framework."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from outlook_parity.core.attributes import Difference, same_value
from outlook_parity.core.program import Node, Program
from outlook_parity.diagnose.program import attention, integers, norms, rotary
from outlook_parity.diagnose.program.activations import Regions, activations
from outlook_parity.diagnose.program.steps import first_difference


def facts_of(nodes: Sequence[Node]) -> dict[str, Any]:
    """Return what a module computes, by attribute."""
    found: dict[str, Any] = norms.facts(nodes) | rotary.facts(nodes) | attention.facts(nodes)
    if names := list(activations(Regions(nodes)).values()):
        found["activation"] = ", ".join(dict.fromkeys(names))
    return found


@dataclass(frozen=True)
class Programs:
    """What both twins computed.

    Attributes:
        torch: of each module that both have, its operations.
        jax: likewise.
    """

    torch: dict[str, list[Node]]
    jax: dict[str, list[Node]]

    def differences(self, path: str, kind: str) -> list[Difference]:
        """Return the attributes of a module that differ."""
        torch, jax = (facts_of(nodes.get(path, ())) for nodes in (self.torch, self.jax))
        return [
            Difference(path, kind, name, torch[name], jax[name])
            for name in torch
            if name in jax and not same_value(torch[name], jax[name])
        ]

    def integers(self, path: str) -> str | None:
        """Return how the integers differ that a module's tables are read at, None if they do not."""
        torch, jax = (integers.read_at(nodes.get(path, ())) for nodes in (self.torch, self.jax))
        for one, other in zip(torch, jax, strict=False):
            if one.shape != other.shape or not np.array_equal(one, other):
                numbers = f"{integers.in_words(other)} in jax, {integers.in_words(one)} in torch"
                starts = [integers.begins_at(indices) for indices in (other, one)]
                if None in starts:
                    return numbers
                return f"positions begin at {starts[0]} in jax, {starts[1]} in torch ({numbers})"
        return None

    def step(self, path: str) -> str | None:
        """Return the first operation of a module that one twin alone has."""
        return first_difference(self.torch.get(path, ()), self.jax.get(path, ()))


def programs_of(torch: Program, jax: Program) -> Programs:
    """Return the operations of both twins by the modules that both have."""
    shared = _with_outer(torch) & _with_outer(jax)
    return Programs(torch.by_module(shared), jax.by_module(shared))


def _with_outer(program: Program) -> set[str]:
    """Return the modules that operations are of, and those around them."""
    paths = set()
    for path in {node.path for node in program.nodes}:
        parts = path.split(".") if path else []
        paths |= {".".join(parts[:count]) for count in range(len(parts) + 1)}
    return paths
