"""`python -m benchmarks.memory CASE BATCH CONTENDER`: the peak memory of one training step, in a process of its own.

Resident memory at its highest during the step, less what was resident before it, after a first step that loads and
compiles; the median of some steps. Freed memory goes back to the system at once (glibc is told so), so that it is not
counted.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from outlook_common.op_cases import BY_NAME, Case
from parity_tests.support.torchvision_stub import declare_missing_torchvision_operators

GLIBC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
ROUNDS = 5
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_megabytes(case: Case, contender: str) -> float:
    """Run this file in a process of its own and return what it measured."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", case.name, str(case.B), contender],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | GLIBC,
    )
    return float(done.stdout)


def _resident(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])  # kB


def _measure(case: Case, contender: str) -> float:
    declare_missing_torchvision_operators()
    from benchmarks.layer import contenders  # imports timm

    step = contenders(case)[contender]().training
    for _ in range(2):
        step()
    return statistics.median(_peak(step) for _ in range(ROUNDS))


def _peak(step: Callable[[], object]) -> float:
    time.sleep(0.2)  # other threads may free what the last step took a little after its end
    CLEAR.write_text("5")  # forget the highest so far
    before = _resident("VmRSS")
    step()
    return (_resident("VmHWM") - before) / 1024


if __name__ == "__main__":
    name, batch, contender = sys.argv[1:]
    print(_measure(BY_NAME[name].with_batch(int(batch)), contender))
