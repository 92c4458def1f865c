"""Usual measures of the difference of two arrays; none decides a verdict. Imports no framework."""

import math

import ml_dtypes
import numpy as np

from outlook_parity.core.precision import Precision

TOP = 5


def measure(torch: np.ndarray, jax: np.ndarray, precision: Precision, *, logits: bool = False) -> dict[str, float]:
    """Return measures of the difference between arrays of one shape, those of distances over finite entries.

    Args:
        torch: in float64.
        jax: likewise.
        precision: that both were computed in, for units in the last place.
        logits: whether they may be logits: then their last axis, if it has two entries or more, counts as the classes.

    Returns:
        "max", "rms": of |torch - jax|. "ulp median", "ulp 99 %", "ulp max": in units in the last place of jax's.
        "cosine": 1 minus the cosine of the angle between them. "tolerance": the smallest t with
        |torch - jax| <= t + t * |jax| everywhere, which assert_allclose would have passed with. "not finite torch",
        "not finite jax": how many. "not finite apart": at how many entries only one is finite, or both differ in kind.
        "top 1 flips", "top 5 flips": in how many rows the largest entries differ. Of logits also those of
        `compare_logits`.
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
        with np.errstate(over="ignore"):  # next to a zero any number is infinitely many units away
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
        if logits:
            measures |= compare_logits(torch, jax)
    return measures


def compare_logits(torch: np.ndarray, jax: np.ndarray) -> dict[str, float]:
    """Return measures of the difference between the predictions of two arrays of logits, over their finite rows.

    Args:
        torch: in float64; the last axis holds two classes or more.
        jax: likewise.

    Returns:
        "KL mean", "KL max": the divergence of softmax(jax) from softmax(torch), in nats, over rows. "top 1 agreement",
        "top 5 agreement": which share of the k most probable classes both have; k is less where there are fewer.
    """
    rows = (np.isfinite(torch) & np.isfinite(jax)).all(axis=-1)
    one, other = torch[rows], jax[rows]
    if not len(one):
        return {}
    log_p, log_q = _log_softmax(one), _log_softmax(other)
    divergence = np.maximum((np.exp(log_p) * (log_p - log_q)).sum(axis=-1), 0.0)  # rounding makes it less than zero
    measures = {"KL mean": float(divergence.mean()), "KL max": float(divergence.max())}
    for k in sorted({1, min(TOP, one.shape[-1] - 1)}):
        best, theirs = (np.argsort(-array, axis=-1, kind="stable")[..., :k] for array in (one, other))
        measures[f"top {k} agreement"] = float((best[..., :, None] == theirs[..., None, :]).any(axis=-1).mean())
    return measures


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def unit_in_the_last_place(array: np.ndarray, precision: Precision) -> np.ndarray:
    """Return the distance from each number to the next larger magnitude in a precision."""
    smallest = float(ml_dtypes.finfo(precision.storage).smallest_normal)  # type: ignore[no-untyped-call]
    _, exponent = np.frexp(np.maximum(np.abs(array), smallest))
    return np.ldexp(precision.epsilon, exponent - 1)


def _alike(torch: np.ndarray, jax: np.ndarray) -> np.ndarray:
    return np.asarray((np.isnan(torch) & np.isnan(jax)) | (torch == jax))  # of single numbers NumPy gives no array
