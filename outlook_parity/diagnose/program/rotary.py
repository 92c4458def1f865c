"""Rotary embeddings in a program: base, layout and first position, told by numbers. Imports no framework.

They are found as a * c + b * s with c² + s² = 1, in whatever way the tables are made; the angles tell the base, and
which entries are rotated with which tells the layout.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from outlook_parity.core.program import CAST, LAYOUT, Node, through

# As many operations are followed backwards to what a rotated half is a part of.
MOST_STEPS = 8


def facts(nodes: Sequence[Node]) -> dict[str, Any]:
    """Return what the first rotary embedding in these operations is, by attribute; nothing if there is none."""
    for node in nodes:
        if node.kind in ("add", "sub") and not node.constant and len(node.operands) == 2:
            found = _rotation(node)
            if found:
                return found
        if node.kind == "mul" and "complex" in node.dtype:
            found = _complex_rotation(node)
            if found:
                return found
    return {}


def _rotation(node: Node) -> dict[str, Any]:
    products = [through(operand, (CAST,)) for operand in node.operands]
    if any(one.kind != "mul" or len(one.operands) != 2 for one in products):
        return {}
    first, second = products
    for a, c in (first.operands, first.operands[::-1]):
        for b, s in (second.operands, second.operands[::-1]):
            tables = _tables(c, s)
            if tables is not None:
                found = _table_facts(*tables)
                layout = _layout(a, b)
                return found | ({"rotary layout": layout} if layout else {})
    return {}


def _tables(c: Node, s: Node) -> tuple[np.ndarray, np.ndarray] | None:
    """Return cosines and sines as (positions, channels), if they are."""
    if not c.floating or not c.shape or c.shape != s.shape or c.shape[-1] < 2 or _reads_product(c) or _reads_product(s):
        return None
    cosines, sines = c.value, s.value
    if cosines is None or sines is None:
        return None
    cosines, sines = (_two_axes(one.astype(np.float64)) for one in (cosines, sines))
    if cosines.ndim != 2 or cosines.shape != sines.shape or len(cosines) < 2:
        return None
    return (cosines, sines) if np.abs(cosines**2 + sines**2 - 1).max() < 1e-2 and np.ptp(cosines) > 0 else None


def _reads_product(node: Node) -> bool:
    """Whether a product of matrices is close behind: then it is no table."""
    pending, steps = [node], MOST_STEPS
    while pending and steps:
        steps -= 1
        one = pending.pop()
        if one.kind in ("dot", "conv"):
            return True
        if one.kind in (LAYOUT, CAST, "slice", "concat", "mul", "neg"):
            pending += one.operands[:1]
    return False


def _two_axes(table: np.ndarray) -> np.ndarray:
    """Return a table without those axes along which it is the same."""
    for axis in range(table.ndim - 2, -1, -1):
        first = np.take(table, [0], axis)
        if table.ndim > 1 and (table.shape[axis] == 1 or (table == first).all()):
            table = np.take(first, 0, axis)
    return table


def _table_facts(cosines: np.ndarray, sines: np.ndarray) -> dict[str, Any]:
    angles = np.arctan2(sines, cosines)
    steps = np.mod(angles[1] - angles[0], 2 * np.pi)
    half = len(steps) // 2
    if len(steps) % 2 == 0 and np.allclose(steps[:half], steps[half:], atol=1e-5):
        frequencies, signs = steps[:half], angles[0][:half]
    elif len(steps) % 2 == 0 and np.allclose(steps[::2], steps[1::2], atol=1e-5):
        frequencies, signs = steps[::2], angles[0][::2]
    else:
        frequencies, signs = steps, angles[0]
    found: dict[str, Any] = {}
    if frequencies[0] > np.pi:  # sines with the other sign
        frequencies, signs = np.mod(-frequencies, 2 * np.pi), -signs
    if len(frequencies) > 1 and frequencies[1] > 0:
        base = float((frequencies[0] / frequencies[1]) ** len(frequencies))
        found["rotary base"] = float(f"{base:.3g}")
        if abs(frequencies[0] - 1) > 1e-3:
            found["rotary scale of positions"] = float(f"{frequencies[0]:.4g}")
        else:
            found["first rotary position"] = round(float(np.mod(signs[0] / frequencies[0] + 1e-6, 2 * np.pi)), 3)
    return found


def _layout(a: Node, b: Node) -> str:
    """Return which entries are rotated with which, "" if that cannot be told."""
    x, y = (one.value for one in (a, b))
    if x is None or y is None or x.shape != y.shape:
        return ""
    half = x.shape[-1] // 2
    if x.shape[-1] % 2 == 0:
        in_halves = np.concatenate([-x[..., half:], x[..., :half]], -1)
        in_pairs = np.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
        for layout, rotated in (("in halves", in_halves), ("interleaved", in_pairs)):
            if np.array_equal(rotated, y) or np.array_equal(-rotated, y):
                return layout
    return _layout_of_parts(a, x)


def _layout_of_parts(a: Node, x: np.ndarray) -> str:
    """Return the layout where both halves are rotated apart."""
    width = x.shape[-1]
    whole = a
    for _ in range(MOST_STEPS):
        if not whole.operands or whole.constant:
            return ""
        whole = whole.operands[0]
        value = whole.value
        if value is not None and value.ndim and value.shape[-1] == 2 * width:
            flat, part = value.reshape(-1, 2 * width), x.reshape(-1, width)
            if flat.shape[0] != part.shape[0]:
                continue
            for layout, parts in (
                ("in halves", (flat[:, :width], flat[:, width:])),
                ("interleaved", (flat[:, ::2], flat[:, 1::2])),
            ):
                if any(np.array_equal(part, one) for one in parts):
                    return layout
    return ""


def _complex_rotation(node: Node) -> dict[str, Any]:
    for operand in node.operands[::-1]:
        value = operand.value
        if value is None or value.dtype.kind != "c" or value.ndim < 2:
            continue
        if np.abs(np.abs(value) - 1).max() < 1e-2:
            table = _two_axes(value)
            if table.ndim == 2 and len(table) > 1:
                return _table_facts(table.real, table.imag) | {"rotary layout": "interleaved"}
    return {}
