"""Which integers tables are read at: token ids, types and positions. Imports no framework."""

from collections.abc import Sequence

import numpy as np

from outlook_parity.core.program import PARAMETER, Node, through


def read_at(nodes: Sequence[Node]) -> list[np.ndarray]:
    """Return the integers that parameters are read at, without axes along which they are the same."""
    found = []
    for node in nodes:
        if node.kind != "gather" or len(node.operands) < 2 or through(node.operands[0]).kind != PARAMETER:
            continue
        indices = node.operands[1]
        if indices.value is not None and indices.value.dtype.kind in "iu":
            found.append(_plain(indices.value))
    return found


def _plain(indices: np.ndarray) -> np.ndarray:
    for axis in range(indices.ndim - 1, -1, -1):
        if indices.ndim > 1 and (indices == np.take(indices, [0], axis)).all():
            indices = np.take(indices, 0, axis)
    return indices


def in_words(indices: np.ndarray) -> str:
    """Return integers in few words."""
    flat = indices.ravel()
    if flat.size > 1 and (np.diff(flat) == 1).all():
        return f"{flat[0]}, {flat[1]}, … {flat[-1]}"
    return ", ".join(map(str, flat[:6])) + (", …" if flat.size > 6 else "")


def begins_at(indices: np.ndarray) -> int | None:
    """Return where integers begin that count up by one, as positions do; None for others."""
    flat = indices.ravel()
    return int(flat[0]) if flat.size > 1 and bool((np.diff(flat) == 1).all()) else None
