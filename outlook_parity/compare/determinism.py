"""How far a twin is from itself when it is called again: part of no verdict. Imports no framework."""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np

from outlook_parity.compare.tensors import Tensors, pairs, relative_error
from outlook_parity.core.check import REVERSED, TWICE, SelfNoise
from outlook_parity.core.precision import PRECISIONS


def self_noise(who: str, dtype: str, first: Tensors, again: Mapping[str, Tensors | str]) -> list[SelfNoise]:
    """Return how far a twin is from itself when it is called again, in each way that must change nothing."""
    found = []
    for how, outputs in again.items():
        if how in (TWICE, REVERSED) and not isinstance(outputs, str):
            worst = 0.0
            for pair in pairs(first, outputs):
                if (arrays := pair.alike()) is None:
                    worst = math.inf
                elif not np.array_equal(*arrays, equal_nan=True):
                    before, after = arrays
                    error = relative_error(after, before)
                    worst = max(worst, error if math.isfinite(error) else math.inf)
            found.append(SelfNoise(who, dtype, how, worst, worst / PRECISIONS[dtype].epsilon))
    return found


# Far more than rounding makes of another order of sums.
MANY_UNITS = 1e4


def notes_on(noises: Sequence[SelfNoise]) -> list[str]:
    """Return in words what self-noises say of the twins, of each kind the largest."""
    notes = []
    for (twin, how), group in groupby(sorted(noises, key=lambda n: (n.twin, n.how)), key=lambda n: (n.twin, n.how)):
        worst = max(group, key=lambda noise: noise.units)
        size = f"{worst.measured:.1e} of the largest output in {worst.dtype}"
        if how == TWICE and worst.measured:
            notes.append(f"{twin} is not deterministic, or keeps state: called twice its outputs differ by {size}")
        elif worst.units > MANY_UNITS:
            notes.append(f"{twin} mixes the samples of a batch: in another order of them its outputs differ by {size}")
    return notes
