"""What the sizes of errors tell of the precision that a twin computed in. Imports no framework.

TF32 is leave to round, not an order: a library may take it for one product and not for another, and a model may forbid
it. So a twin that multiplies in full where TF32 was asked for is no fault, and passes as long as the other's error is
one that counts as rounding; but it is said.
"""

import math
from collections.abc import Iterable, Mapping

from outlook_parity.core.check import Check, Noise
from outlook_parity.core.precision import LEAST_SHOWN, MOST_SHOWN, PRECISIONS


def unrounded(checks: Iterable[Check]) -> dict[str, list[str]]:
    """Return by precision in which products may round, which twins show none of it in any output or module."""
    twins: dict[str, dict[str, bool]] = {}
    for check in checks:
        noises = _noises(check)
        if noises and check.level in ("forward", "layers") and PRECISIONS[check.dtype].products != "full":
            exact = twins.setdefault(check.dtype, dict.fromkeys(noises, True))
            for twin, noise in noises.items():
                exact[twin] &= noise.rms < LEAST_SHOWN
    return {dtype: [twin for twin, so_far in exact.items() if so_far] for dtype, exact in twins.items()}


def notes_on_products(checks: Iterable[Check]) -> list[str]:
    """Return in words which twins multiply in full where they need not."""
    return [f"in {dtype} {_in_full(dtype, twins)}" for dtype, twins in unrounded(checks).items() if twins]


def finer_products(wrong: Iterable[Check], exact: Mapping[str, list[str]]) -> str:
    """Return in words that one twin alone multiplies in full, if nothing is wrong but where that shows; else ""."""
    dtypes = {check.dtype for check in wrong}
    if len(dtypes) != 1 or len(exact.get(dtype := dtypes.pop(), ())) != 1:
        return ""
    return f"in {dtype} alone: {_in_full(dtype, exact[dtype])}"


def _in_full(dtype: str, twins: list[str]) -> str:
    if len(twins) == 1:
        (twin,) = twins
        other = {"torch": "jax", "jax": "torch"}[twin]
        return f"{twin} shows no rounding of products and {other} does: {twin} multiplies in full precision"
    return "neither twin shows any rounding of products: nothing in them is multiplied so, or they forbid it"


def as_coarse_as(check: Check) -> str:
    """Return in words which coarser precision would make an error as large as that of one of the twins; "" if none."""
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
    """Return in words that twins differ in float64 by as much as float32 rounds; "" if not."""
    if check.dtype != "float64" or check.measured is None:
        return ""
    units = check.measured / PRECISIONS["float32"].epsilon
    shown = LEAST_SHOWN <= units <= MOST_UNITS
    return f"by {check.measured:.1e}, as float32 inside one of them or both would make it" if shown else ""


# The most by which a few operations in float32 make one entry differ, in units of its rounding.
MOST_UNITS = 8.0

# Of a product, in units of the rounding of what it multiplies.
USUAL = 0.3


def _noises(check: Check) -> dict[str, Noise]:
    noises = {"torch": check.torch_noise, "jax": check.jax_noise}
    return {twin: noise for twin, noise in noises.items() if noise is not None}
