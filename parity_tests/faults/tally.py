"""Count how many planted faults are called a mismatch, where, and for what."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from outlook_parity import Report

Fault = TypeVar("Fault")


def tally(
    family: str,
    faults: Sequence[Fault],
    run: Callable[[Fault], Report],
    found: Callable[[Fault, Report], tuple[bool, bool, bool]],
) -> list[int]:
    """Return the number planted, called a mismatch, placed, and told; print a line for each fault.

    Args:
        family: what the faults have in common.
        faults: each with its name as a string.
        run: plants one and verifies.
        found: whether it is a mismatch, at the right place, for the right cause.
    """
    counts = [0, 0, 0, 0]
    for fault in faults:
        report = run(fault)
        marks = found(fault, report)
        counts = [count + int(new) for count, new in zip(counts, (True, *marks), strict=True)]
        signs = "".join("+" if mark else "-" for mark in marks)
        said = f"{report.verdict}, {report.first_divergence}, {report.cause or ''}"
        print(f"{signs}  {family}: {fault}: {said}", flush=True)
    return counts


def print_table(counts: Mapping[str, Sequence[int]]) -> None:
    """Print the counts of each family and of all."""
    total = [sum(column) for column in zip(*counts.values(), strict=True)]
    print("\nin                planted  mismatch  right place  right cause")
    for family, (planted, *shares) in {**counts, "all": total}.items():
        print(f"{family:<18}{planted:>7}" + "".join(f"{share:>7} ({share / max(planted, 1):.0%})" for share in shares))
