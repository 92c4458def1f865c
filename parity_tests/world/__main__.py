"""Verify every honest pair of other packages, plant every fault, and tally what is called, where, and for what.

python -m parity_tests.world [words of names]
"""

import sys
import time
import traceback

from benchmarks.torchvision_stub import declare_missing_torchvision_operators
from outlook_parity import Report
from outlook_parity.backends.jax.work import unoptimized
from parity_tests.faults.tally import print_table, tally
from parity_tests.support.arithmetic import make_exact
from parity_tests.world.faults import FAULTS, Fault
from parity_tests.world.pairs import PAIRS
from parity_tests.world.run import found, largest_difference, verify_fault, verify_pair
from parity_tests.world.small import SMALL_PAIRS

VISIBLE = 1e-5  # of the largest output: faults that change less are not counted as planted


def _chosen(name: str) -> bool:
    return all(word in name for word in sys.argv[1:])


def honest() -> None:
    """Print a line for each honest pair, and how many pass."""
    pairs, passed = [pair for pair in (*PAIRS, *SMALL_PAIRS) if _chosen(pair.name)], 0
    for pair in pairs:
        begun = time.perf_counter()
        try:
            report = verify_pair(pair)
            said, good = f"{report.verdict} {report.cause or report.reason or ''}", report.verdict == "pass"
        except Exception as error:  # one pair that fails must not stop the tally
            said, good = f"error: {traceback.format_exception_only(error)[-1].strip()}", False
        passed += good
        print(f"{'+' if good else '-'}  {pair.name}: {said} ({time.perf_counter() - begun:.0f} s)", flush=True)
    print(f"\n{passed} of {len(pairs)} honest pairs pass\n", flush=True)


def planted(fault: Fault) -> Report:
    """Plant a fault and verify; print how much of the outputs it changes if that is hardly anything."""
    report = verify_fault(fault)
    if "forward" in fault.levels and (difference := largest_difference(report)) < VISIBLE:
        print(f"   {fault}: changes the outputs by {difference:.1e} only", flush=True)
    return report


def main() -> None:
    make_exact()
    declare_missing_torchvision_operators()
    with unoptimized():
        honest()
        counts = {"the world": tally("the world", [one for one in FAULTS if _chosen(one.name)], planted, found)}
    print_table(counts)


if __name__ == "__main__":
    main()
