"""Which numbers norms have, those written by hand too. Imports no framework."""

from collections.abc import Sequence
from typing import Any

from outlook_parity.core.program import CAST, LAYOUT, PARAMETER, Node, through


def facts(nodes: Sequence[Node]) -> dict[str, Any]:
    """Return eps and the form of the weight of the norms in these operations, by attribute."""
    eps: list[float] = []
    normalises = False
    for node in nodes:
        if node.constant:
            continue
        if node.kind == "norm":
            eps.append(node.settings["eps"])
            continue
        if _is_root(node):
            normalises = True
            under = through(node.operands[0])
            if (number := _added(under)) is not None:
                eps.append(number)
        elif node.kind == "div" and len(node.operands) == 2:
            below = through(node.operands[1])
            if (number := _added(below)) is not None and any(map(_is_root, map(through, below.operands))):
                eps.append(number)
    found: dict[str, Any] = {}
    distinct = list(dict.fromkeys(float(f"{one:.4g}") for one in eps))
    if distinct:
        found["eps"] = distinct[0] if len(distinct) == 1 else tuple(distinct)
    if normalises and (form := _weight(nodes)):
        found["weight of the norm"] = form
    return found


def _is_root(node: Node) -> bool:
    if node.kind in ("rsqrt", "sqrt") and not node.constant:
        return True
    exponent = node.settings.get("exponent") if node.kind == "pow" else None
    if node.kind == "pow" and len(node.operands) == 2:
        exponent = node.operands[1].number
    return exponent in (-0.5, 0.5)


def _added(node: Node) -> float | None:
    """Return the number that is added last, or the least that is let through; None if there is none."""
    if node.kind in ("add", "max") and len(node.operands) == 2:
        return next((number for one in node.operands if (number := one.number) is not None), None)
    return node.settings.get("low") if node.kind == "clamp" else None


def _weight(nodes: Sequence[Node]) -> str:
    """Return whether results are multiplied by a parameter or by one more than it."""
    for node in nodes:
        if node.kind != "mul" or len(node.operands) != 2:
            continue
        for operand in map(through, node.operands):
            if operand.kind == PARAMETER and len(_inner_shape(operand)) <= 1:
                return "weight"
            if operand.kind == "add" and len(operand.operands) == 2:
                one, other = (through(inner, (LAYOUT, CAST)) for inner in operand.operands)
                for parameter, number in ((one, other.number), (other, one.number)):
                    if parameter.kind == PARAMETER and number is not None:
                        return f"{number:g} + weight"
    return ""


def _inner_shape(node: Node) -> tuple[int, ...]:
    return tuple(length for length in node.shape if length != 1)
