"""How far apart two arrays are, in the measures that people know. None of them decides a verdict. No framework."""

import math

import ml_dtypes
import numpy as np

from outlook_parity.core.precision import Precision

TOP = 5


def measure(torch: np.ndarray, jax: np.ndarray, precision: Precision) -> dict[str, float]:
    """Return measures of the difference between arrays of one shape; those of distances are over finite entries.

    Args:
        torch: in float64.
        jax: likewise.
        precision: that both were computed in: its units in the last place are counted.

    Returns:
        "max", "rms": of |torch - jax|. "ulp median", "ulp 99 %", "ulp max": in units in the last place of jax's.
        "cosine": 1 minus the cosine of the angle between them. "tolerance": the smallest t with
        |torch - jax| <= t + t * |jax| everywhere, which assert_allclose would have passed with. "not finite torch",
        "not finite jax": how many. "not finite apart": at how many places one alone is, or another kind than the other.
        "top 1 flips", "top 5 flips": at how many rows the largest entries are others.
    """
    finite = np.isfinite(torch) & np.isfinite(jax)
    measures = {
        "not finite torch": float((~np.isfinite(torch)).sum()),
        "not finite jax": float((~np.isfinite(jax)).sum()),
        "not finite apart": float((~finite & ~_alike(torch, jax)).sum()),
    }
    one, other = torch[finite], jax[finite]
    if one.size:
        error = np.abs(one - other)
        with np.errstate(over="ignore"):  # a number beside a zero is infinitely many units away
            ulps = error / unit_in_the_last_place(other, precision)
        measures |= {
            "max": float(error.max()),
            "rms": math.sqrt(float(np.square(error).mean())),
            "ulp median": float(np.median(ulps)),
            "ulp 99 %": float(np.percentile(ulps, 99, method="nearest")),
            "ulp max": float(ulps.max()),
            "tolerance": float((error / (1 + np.abs(other))).max()),
        }
        lengths = math.sqrt(float(np.square(one).sum()) * float(np.square(other).sum()))
        if lengths > 0:
            measures["cosine"] = 1 - float((one * other).sum()) / lengths
    if torch.ndim > 1 and torch.shape[-1] > 1:
        for k in (1, min(TOP, torch.shape[-1] - 1)):
            largest = [np.sort(np.argsort(-array, axis=-1, kind="stable")[..., :k]) for array in (torch, jax)]
            measures[f"top {k} flips"] = float((largest[0] != largest[1]).any(axis=-1).sum())
    return measures


def unit_in_the_last_place(array: np.ndarray, precision: Precision) -> np.ndarray:
    """Return the distance from each number to the next larger one in size, in a precision."""
    smallest = float(ml_dtypes.finfo(precision.storage).smallest_normal)  # type: ignore[no-untyped-call]
    _, exponent = np.frexp(np.maximum(np.abs(array), smallest))
    return np.ldexp(precision.epsilon, exponent - 1)


def _alike(torch: np.ndarray, jax: np.ndarray) -> np.ndarray:
    return np.asarray((np.isnan(torch) & np.isnan(jax)) | (torch == jax))  # of single numbers NumPy gives no array
