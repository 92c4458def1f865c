"""What a program does in attention: softmax, scale, mask, order of repeated heads. Imports no framework."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from outlook_parity.core.program import CAST, LAYOUT, Node, through

# What is below counts as masked: Swin's masks have -100.
MASKED = -60.0

# As many operations are followed backwards.
MOST_STEPS = 40


def softmaxes(nodes: Sequence[Node]) -> Iterator[tuple[Node, Node]]:
    """Yield what a softmax is computed of, and the operation that ends it."""
    for node in nodes:
        if node.kind == "softmax":
            yield node.operands[0], node
        elif node.kind == "div" and len(node.operands) == 2:
            powers, total = through(node.operands[0], (CAST,)), through(node.operands[1])
            if powers.kind == "exp" and total.kind == "sum" and through(total.operands[0], (CAST,)) is powers:
                shifted = through(powers.operands[0], (CAST,))
                yield (shifted.operands[0] if shifted.kind == "sub" else shifted), node


def channels_of(logits: Node) -> int | None:
    """Return how many channels of queries and keys are multiplied for each logit, None if no product is found."""
    node, steps = logits, MOST_STEPS
    pending = [node]
    while pending and steps:
        node, steps = pending.pop(0), steps - 1
        if node.constant or not node.operands:
            continue
        if node.kind == "dot":
            first = node.operands[0]
            contracted = node.settings.get("contracted", ((len(first.shape) - 1,),))[0]
            return int(np.prod([first.shape[axis] for axis in contracted]))
        if node.kind in (LAYOUT, CAST, "slice"):
            pending.append(node.operands[0])
        elif node.kind in ("mul", "div", "add", "sub", "where", "max", "min"):
            pending += node.operands
    return None


def scale_of(logits: Node) -> float | None:
    """Return by what the product of queries and keys is multiplied, None if no product is found."""
    return _scale(logits, MOST_STEPS)


def _scale(node: Node, steps: int) -> float | None:
    if steps == 0 or node.constant or not node.operands:
        return None
    if node.kind == "dot":
        return _factor(node.operands[0], steps) * _factor(node.operands[1], steps)
    if node.kind in (LAYOUT, CAST, "slice"):
        return _scale(node.operands[0], steps - 1)
    if node.kind in ("mul", "div"):
        for one, other in (node.operands, node.operands[::-1]):
            if (number := other.number) and (inner := _scale(one, steps - 1)) is not None:
                return inner * number if node.kind == "mul" else inner / number if one is node.operands[0] else None
        return None
    if node.kind in ("add", "sub", "where", "max", "min"):
        return next((found for one in node.operands if (found := _scale(one, steps - 1)) is not None), None)
    return None


def _factor(node: Node, steps: int) -> float:
    """Return the numbers that an operand of a product was multiplied by."""
    factor = 1.0
    while steps and node.operands and not node.constant:
        steps -= 1
        if node.kind in (LAYOUT, CAST):
            node = node.operands[0]
        elif node.kind in ("mul", "div") and (number := node.operands[1].number):
            factor, node = factor * number if node.kind == "mul" else factor / number, node.operands[0]
        elif node.kind == "mul" and (number := node.operands[0].number):
            factor, node = factor * number, node.operands[1]
        elif node.kind in ("add", "sub") and node.operands[0].kind == "mul":  # of a rotary embedding
            node = node.operands[0].operands[0]
        else:
            break
    return factor


def mask_of(logits: Node) -> str | None:
    """Return in words which keys each query may see, None if that cannot be had."""
    value = logits.value
    if value is None or value.ndim < 2 or value.dtype.kind != "f":
        return None
    with np.errstate(invalid="ignore"):
        seen = value.astype(np.float64) > MASKED
    if seen.all():
        return "none"
    flat = seen.reshape(-1, *seen.shape[-2:])
    if not (flat == flat[0]).all():
        return f"one that hides {1 - seen.mean():.1%} of the places"
    return _shape_of(flat[0])


def _shape_of(seen: np.ndarray) -> str:
    queries, keys = seen.shape
    distance = (np.arange(queries)[:, None] + keys - queries) - np.arange(keys)[None, :]
    if (seen == (distance >= 0)).all():
        return "causal"
    for window in range(1, keys):
        if (seen == ((distance >= 0) & (distance < window))).all():
            return f"causal, with a window of {window}"
        if (seen == (np.abs(distance) < window)).all():
            return f"a window of {window} to each side"
        if (seen == (distance >= window)).all():
            return f"causal, without the last {window}"
        if (seen == (distance >= -window)).all():
            return f"causal, with {window} to come"
    if (seen == seen[0]).all():
        return f"{keys - int(seen[0].sum())} of {keys} keys hidden"
    return f"one that hides {1 - seen.mean():.1%} of the places"


def order_of_heads(nodes: Sequence[Node]) -> str | None:
    """Return the order in which heads of keys are repeated, as numbers of the first equal one; None if none is."""
    for node in nodes:
        if node.kind != "dot" or len(node.operands) != 2:
            continue
        for side in (1, 0):
            operand = node.operands[side]
            labels = _labels(operand, node.settings.get("batch", ((0,), (0,)))[side])
            if labels is not None:
                return labels
    return None


def _labels(operand: Node, batch: Sequence[int]) -> str | None:
    if operand.constant or not any(one.kind in ("concat", LAYOUT) for one in (operand, *operand.operands)):
        return None
    if not batch or len(operand.shape) < 3 or np.prod(operand.shape) > 1 << 22:
        return None
    value = operand.value
    if value is None or value.dtype.kind != "f":
        return None
    moved = np.moveaxis(value, batch, range(len(batch)))
    parts = moved.reshape(int(np.prod(moved.shape[: len(batch)])), -1)
    firsts: dict[bytes, int] = {}
    labels = [firsts.setdefault(part.tobytes(), index) for index, part in enumerate(parts)]
    if len(firsts) in (1, len(labels)):
        return None
    return ", ".join(map(str, labels[:12]))


def facts(nodes: Sequence[Node]) -> dict[str, Any]:
    """Return what attention does in these operations, by attribute."""
    found: dict[str, Any] = {}
    # Not the axis: which one the keys lie on is a matter of each twin's layout.
    for logits, end in softmaxes(nodes):
        found.setdefault("softmax dtype", end.dtype if end.kind != "softmax" else logits.dtype)
        if (scale := scale_of(logits)) is not None:
            if (channels := channels_of(logits)) is not None:
                found.setdefault("channels per head", channels)
            found.setdefault("attention scale", float(f"{scale:.5g}"))
            if (mask := mask_of(logits)) is not None:
                found.setdefault("attention mask", mask)
    if (order := order_of_heads(nodes)) is not None:
        found["order of repeated heads"] = order
    return found
