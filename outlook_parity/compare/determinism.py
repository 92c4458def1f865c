"""A twin against itself: called again, and module by module. Imports no framework."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np

from outlook_parity.compare.tensors import (
    FACTOR_BOUND,
    RELATIVE_BOUNDS,
    TensorPair,
    compare_pair,
    output_suffix,
    pairs,
    relative_error,
)
from outlook_parity.core.check import REVERSED, TWICE, Check, SelfNoise, Tensors
from outlook_parity.core.precision import PRECISIONS


def self_noise(twin: str, dtype: str, first: Tensors, repeated: Mapping[str, Tensors | str]) -> list[SelfNoise]:
    """Return how far a twin is from itself when it is called again, in each way that must change nothing."""
    noises = []
    for how, outputs in repeated.items():
        if how in (TWICE, REVERSED) and not isinstance(outputs, str):
            error = max((_distance(pair) for pair in pairs(first, outputs)), default=0.0)
            noises.append(SelfNoise(twin, dtype, how, error, error / PRECISIONS[dtype].epsilon))
    return noises


def _distance(pair: TensorPair) -> float:
    """Return max|again - first| / max|first|, infinite where that is no number or shapes differ."""
    if (arrays := pair.alike()) is None:
        return math.inf
    first, again = arrays
    if np.array_equal(first, again, equal_nan=True):
        return 0.0
    error = relative_error(again, first)
    return error if math.isfinite(error) else math.inf


# Far more than rounding in another order of sums can make.
MANY_UNITS = 1e4


def notes_on(noises: Sequence[SelfNoise]) -> list[str]:
    """Return notes on twins that are not deterministic or mix the samples of a batch, with the largest self-noise."""
    notes = []
    for (twin, how), group in groupby(sorted(noises, key=lambda n: (n.twin, n.how)), key=lambda n: (n.twin, n.how)):
        worst = max(group, key=lambda noise: noise.units)
        size = f"{worst.measured:.1e} of the largest output in {worst.dtype}"
        if how == TWICE and worst.measured:
            notes.append(f"{twin} is not deterministic, or keeps state: called twice its outputs differ by {size}")
        elif worst.units > MANY_UNITS:
            notes.append(f"{twin} mixes the samples of a batch: in another order of them its outputs differ by {size}")
    return notes


def compare_self(twin: str, dtype: str, jitted: Tensors, by_module: Tensors, truth: Tensors | None) -> list[Check]:
    """Return rows on whether a twin that runs module by module gives what it gives as a user runs it.

    The outputs are compared as the twins' are with each other.
    """
    how = {"torch": "watched against plain", "jax": "module by module against jit"}[twin]
    bound = RELATIVE_BOUNDS["forward"] if truth is None else FACTOR_BOUND
    checks = []
    for pair in pairs(by_module, jitted):
        row = replace(pair, name=f"{twin}: {how}{output_suffix(pair.name)}")
        exact = None if truth is None else truth.get(pair.name)
        checks.append(compare_pair("self-check", dtype, row, bound=bound, truth=exact))
    return checks


def compare_repeated(dtype: str, repeated: Mapping[str, Mapping[str, Tensors | str]]) -> list[Check]:
    """Return rows on whether the twins still agree when they are called again.

    What either refuses, or both answer with NaN or Inf at the same positions, is skipped: the verifier chose those
    inputs.

    Args:
        dtype: float64, in which alone they must agree to rounding.
        repeated: twin -> how -> outputs, or the message of a refusal.
    """
    checks = []
    for how, torch in repeated["torch"].items():
        jax = repeated["jax"].get(how, {})
        if isinstance(torch, str) or isinstance(jax, str):
            refusals = {"torch": torch, "jax": jax}
            note = "; ".join(f"{twin} refuses: {why}" for twin, why in refusals.items() if isinstance(why, str))
            checks.append(Check("again", dtype, how, "skipped", 0.0, note=note))
        else:
            checks += [_compare_repeated(dtype, replace(p, name=f"{how}: {p.name}")) for p in pairs(torch, jax)]
    return checks


def _compare_repeated(dtype: str, pair: TensorPair) -> Check:
    check = compare_pair("again", dtype, pair, bound=RELATIVE_BOUNDS["forward"])
    if check.verdict == "mismatch" and _undefined_alike(pair):
        return replace(check, verdict="skipped", note=f"{check.note}, at the same positions")
    return check


def _undefined_alike(pair: TensorPair) -> bool:
    """Whether both are NaN or Inf at the same positions, and agree elsewhere."""
    if (arrays := pair.alike()) is None:
        return False
    torch, jax = arrays
    finite = np.isfinite(torch)
    if finite.all() or not np.array_equal(finite, np.isfinite(jax)):
        return False
    return not finite.any() or relative_error(torch[finite], jax[finite]) <= RELATIVE_BOUNDS["forward"]
