"""Which precision an error looks like. Imports no framework.

TF32 permits rounding and does not require it: a library may use it for one product and not for another, and a model may
forbid it. So a twin that multiplies in full precision where TF32 was requested is no fault, and passes as long as the
other's error counts as rounding; a note reports it.
"""

import math
from collections.abc import Iterable, Mapping

from outlook_parity.core.check import Check, Noise
from outlook_parity.core.precision import LEAST_SHOWN, MOST_SHOWN, PRECISIONS


def unrounded(checks: Iterable[Check]) -> dict[str, list[str]]:
    """Return precision in which products may round -> the twins that show no such rounding anywhere."""
    twins: dict[str, dict[str, bool]] = {}
    for check in checks:
        noises = _noises(check)
        if noises and check.level in ("forward", "layers") and PRECISIONS[check.dtype].products != "full":
            exact = twins.setdefault(check.dtype, dict.fromkeys(noises, True))
            for twin, noise in noises.items():
                exact[twin] &= noise.rms < LEAST_SHOWN
    return {dtype: [twin for twin, so_far in exact.items() if so_far] for dtype, exact in twins.items()}


def notes_on_products(checks: Iterable[Check]) -> list[str]:
    """Return notes on twins that multiply in full precision where they need not."""
    return [f"in {dtype} {_full_precision(dtype, twins)}" for dtype, twins in unrounded(checks).items() if twins]


def finer_products(wrong: Iterable[Check], in_full: Mapping[str, list[str]]) -> str:
    """Return in words that one twin alone multiplies in full precision, if only that precision is wrong; else ""."""
    dtypes = {check.dtype for check in wrong}
    if len(dtypes) != 1 or len(in_full.get(dtype := dtypes.pop(), ())) != 1:
        return ""
    return f"in {dtype} alone: {_full_precision(dtype, in_full[dtype])}"


def _full_precision(dtype: str, twins: list[str]) -> str:
    if len(twins) == 1:
        (twin,) = twins
        other = {"torch": "jax", "jax": "torch"}[twin]
        return f"{twin} shows no rounding of products and {other} does: {twin} multiplies in full precision"
    return "neither twin shows any rounding of products: nothing in them is multiplied so, or they forbid it"


def as_coarse_as(check: Check) -> str:
    """Return in words which coarser precision would explain the error of one twin; "" if none."""
    noises = _noises(check)
    if not noises:
        return ""
    own = PRECISIONS[check.dtype].epsilon
    less, more = sorted(noises, key=lambda twin: noises[twin].rms)
    coarser: dict[float, list[str]] = {}
    for name, precision in PRECISIONS.items():
        units = noises[more].rms * own / precision.epsilon
        exact = noises[less].rms * own / precision.epsilon < LEAST_SHOWN
        if precision.epsilon > own and exact and LEAST_SHOWN <= units <= MOST_SHOWN:
            coarser.setdefault(abs(math.log(units / USUAL)), []).append(name)
    return f"{more} errs as {' or '.join(coarser[min(coarser)])} would" if coarser else ""


def as_float32_rounds(check: Check) -> str:
    """Return in words that twins differ in float64 by as much as float32 rounds; "" if they do not."""
    if check.dtype != "float64" or check.measured is None:
        return ""
    units = check.measured / PRECISIONS["float32"].epsilon
    shown = LEAST_SHOWN <= units <= MOST_UNITS
    return f"by {check.measured:.1e}, as float32 inside one of them or both would make it" if shown else ""


# The largest error that a few operations in float32 make in one entry, in units of its rounding.
MOST_UNITS = 8.0

# The usual RMS error of a product, in units of the rounding of its factors.
USUAL = 0.3


def _noises(check: Check) -> dict[str, Noise]:
    noises = {"torch": check.torch_noise, "jax": check.jax_noise}
    return {twin: noise for twin, noise in noises.items() if noise is not None}
