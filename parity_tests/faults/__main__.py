"""Plant every fault in either twin, and tally how many are called a mismatch, where, and for what.

python -m parity_tests.faults ["the layer" | "a VOLO" | "faults that hide"]
"""

import sys
from collections.abc import Sequence

import pytest

from outlook_parity import Report
from parity_tests.faults import attention, hidden, volo
from parity_tests.faults.fault import Containing, Fault
from parity_tests.support.arithmetic import make_exact, quick_compilation

FAMILIES: dict[str, Sequence[Fault]] = {
    "the layer": attention.FAULTS,
    "a VOLO": volo.FAULTS,
    "faults that hide": hidden.FAULTS,
}


def found(fault: Fault, report: Report) -> tuple[bool, bool, bool]:
    """Return whether it is a mismatch, at the right place, for the right cause."""
    # A place that no module has, an optimizer say, must be told as none; a cause that is but a place tells no kind.
    told = fault.cause not in ("", fault.path) and report.cause == Containing(fault.cause)
    return report.verdict == "mismatch", report.first_divergence == fault.path, told


def tally(family: str, faults: Sequence[Fault]) -> list[int]:
    """Return the number planted, called a mismatch, placed, and told."""
    counts = [0, 0, 0, 0]
    for fault in faults:
        with pytest.MonkeyPatch.context() as patch:
            report = fault.run(patch)
        marks = found(fault, report)
        counts = [count + int(new) for count, new in zip(counts, (True, *marks), strict=True)]
        signs = "".join("+" if mark else "-" for mark in marks)
        said = f"{report.verdict}, {report.first_divergence}, {report.cause or ''}"
        print(f"{signs}  {family}: {fault}: {said}", flush=True)
    return counts


def main() -> None:
    make_exact()
    families = sys.argv[1:] or list(FAMILIES)
    with quick_compilation():
        counts = {family: tally(family, FAMILIES[family]) for family in families}
    total = [sum(column) for column in zip(*counts.values(), strict=True)]
    print("\nin                planted  mismatch  right place  right cause")
    for family, (planted, *shares) in {**counts, "all": total}.items():
        print(f"{family:<18}{planted:>7}" + "".join(f"{share:>7} ({share / planted:.0%})" for share in shares))


if __name__ == "__main__":
    main()
