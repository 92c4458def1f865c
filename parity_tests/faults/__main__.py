"""Plant every fault in either twin, and tally how many are called a mismatch, where, and for what.

python -m parity_tests.faults ["the layer" | "a VOLO" | "faults that hide"]
"""

import sys
from collections.abc import Sequence

import pytest

from outlook_parity import Report
from outlook_parity.backends.jax.work import unoptimized
from parity_tests.faults import attention, hidden, volo
from parity_tests.faults.fault import Containing, Fault
from parity_tests.faults.tally import print_table, tally
from parity_tests.support.arithmetic import make_exact

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


def run(fault: Fault) -> Report:
    """Plant a fault, and verify."""
    with pytest.MonkeyPatch.context() as patch:
        return fault.run(patch)


def main() -> None:
    make_exact()
    families = sys.argv[1:] or list(FAMILIES)
    with unoptimized():
        counts = {family: tally(family, FAMILIES[family], run, found) for family in families}
    print_table(counts)


if __name__ == "__main__":
    main()
