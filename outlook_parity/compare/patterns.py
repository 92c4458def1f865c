"""How two arrays differ, in words: by a factor, in their order, in few places. Imports no framework."""

from collections.abc import Callable, Mapping
from itertools import permutations

import numpy as np

CLOSE = 1e-6


def how_they_differ(torch: np.ndarray, jax: np.ndarray) -> str:
    """Return in what way arrays of one shape differ, or "" if in none that is known."""
    if torch.shape != jax.shape or torch.size == 0:
        return ""
    # What differs by less than `CLOSE`, or not at all, is close to itself in many another order too.
    for rule in (_few,) if _equal(torch, jax) else RULES:
        if words := rule(torch, jax):
            return words
    return ""


def _not_finite(torch: np.ndarray, jax: np.ndarray) -> str:
    counts = {name: int((~np.isfinite(array)).sum()) for name, array in (("torch", torch), ("jax", jax))}
    return ", ".join(f"{count} NaN or Inf in {name}" for name, count in counts.items() if count)


def _factor(torch: np.ndarray, jax: np.ndarray) -> str:
    square = float((torch * torch).sum())
    factor = float((torch * jax).sum()) / square if square else 0.0
    if factor and _equal(factor * torch, jax) and abs(factor - 1) > CLOSE:
        return f"jax has {factor:.4g} times what torch has"
    return "zero in torch" if not square else "zero in jax" if not jax.any() else ""


def _transposed(torch: np.ndarray, jax: np.ndarray) -> str:
    square = torch.ndim == 2 and torch.shape[0] == torch.shape[1]
    return "transposed in one of them" if square and _equal(torch.T, jax) else ""


def _exchanged(torch: np.ndarray, jax: np.ndarray) -> str:
    """Parts along an axis exchanged, as queries and keys in one matrix."""
    for axis in range(torch.ndim):
        for parts in (2, 3):
            if torch.shape[axis] % parts == 0 and torch.shape[axis] > 1:
                pieces = np.split(torch, parts, axis)
                for order in list(permutations(range(parts)))[1:]:
                    if _equal(np.concatenate([pieces[i] for i in order], axis), jax):
                        return f"its {parts} parts along axis {axis} are in the order {list(order)} in jax"
    return ""


def _flipped(torch: np.ndarray, jax: np.ndarray) -> str:
    for axis in range(torch.ndim):
        if torch.shape[axis] > 1 and _equal(np.flip(torch, axis), jax):
            return f"reversed along axis {axis}"
        for shift in (1, -1):
            if torch.shape[axis] > 2 and _equal(np.roll(torch, shift, axis), jax):
                return f"shifted by {shift} along axis {axis} in jax"
    return ""


def _other_order(torch: np.ndarray, jax: np.ndarray) -> str:
    if torch.size > 1 and _equal(np.sort(torch, axis=None), np.sort(jax, axis=None)):
        return "the same numbers in another order"
    return ""


def _few(torch: np.ndarray, jax: np.ndarray) -> str:
    scale = float(np.abs(torch).max()) or 1.0
    places = np.argwhere(np.abs(torch - jax) > 1e-12 * scale)
    if 0 < len(places) <= max(1, torch.size // 50):
        return f"they differ in {len(places)} of {torch.size} places, the first {places[0].tolist()}"
    return ""


def _offset(torch: np.ndarray, jax: np.ndarray) -> str:
    difference = jax - torch
    if difference.ndim > 1 and len(difference.reshape(-1, difference.shape[-1])) > 1:
        rows = difference.reshape(-1, difference.shape[-1])
        if _equal(np.broadcast_to(rows[0], rows.shape), rows) and rows.any():
            return "they differ by one number per channel, as by a bias"
    return ""


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.abs(one - other).max() <= CLOSE * np.abs(other).max())


RULES: tuple[Callable[[np.ndarray, np.ndarray], str], ...] = (
    _not_finite,
    _few,
    _factor,
    _transposed,
    _exchanged,
    _flipped,
    _other_order,
    _offset,
)


def weight_difference(name: str, torch: Mapping[str, np.ndarray], jax: Mapping[str, np.ndarray]) -> str:
    """Return how one weight differs: as above, or that a twin has another one's values there."""
    ours, theirs = torch.get(name), jax.get(name)
    if ours is None or theirs is None:
        return ""
    for where, array, others in (("jax", theirs, torch), ("torch", ours, jax)):
        for other, values in others.items():
            if other != name and _same_numbers(values, array):
                return f"{where} has the values of {other} there"
    return how_they_differ(ours, theirs)


def _same_numbers(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether arrays are equal and not by being constant, as all that is zero or one at first."""
    return one.shape == other.shape and bool((one != one.flat[:1]).any()) and np.array_equal(one, other)
