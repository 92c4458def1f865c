"""Verify a pair of other packages, and judge what the report says of a fault."""

import jax
import numpy as np

from outlook_parity import NameMap, Report, verify
from parity_tests.world.faults import Fault
from parity_tests.world.pairs import Made, Pair

DTYPES = ("float64", "float32")


def verify_made(made: Made, levels: tuple[str, ...] | None = None, axes: tuple[int, ...] | None = None) -> Report:
    """Return the report on both models, as a user calls it who writes nothing else."""
    names = None if axes is None else NameMap(torch_axes=axes)
    try:
        return verify(made.torch_model, made.jax_model, made.inputs, levels=levels, dtypes=DTYPES, names=names)
    finally:
        jax.clear_caches()  # programs of sixty pairs would fill the memory


def verify_pair(pair: Pair) -> Report:
    """Return the report on an honest pair, on its levels."""
    return verify_made(pair.make(), pair.levels, pair.torch_axes)


def verify_fault(fault: Fault) -> Report:
    """Return the report on a faulty pair."""
    with fault.during():
        return verify_made(fault.make(), fault.levels)


def found(fault: Fault, report: Report) -> tuple[bool, bool, bool]:
    """Return whether it is a mismatch, at the right place, for the right cause."""
    path, cause = report.first_divergence or "", (report.cause or "").lower()
    return (
        report.verdict == "mismatch",
        any(place in path for place in fault.place),
        any(word.lower() in cause for word in fault.cause),
    )


def largest_difference(report: Report) -> float:
    """Return by how much of its largest entry an output of the twins differs in float64: whether a fault shows."""
    rows = [row.measured or 0.0 for row in report.checks if (row.level, row.dtype) == ("forward", "float64")]
    return float(np.max(rows, initial=0.0))
