"""Interleaved timing: every contender in turn, many rounds, medians."""

import statistics
import time
from collections.abc import Callable, Mapping

Contenders = Mapping[str, Callable[[], object]]


def interleave(contenders: Contenders, *, rounds: int, warmup: int = 2) -> dict[str, float]:
    """Return the median seconds of each contender over `rounds` rounds, in each of which all of them take their turn.

    A machine that slows down for a while so slows all of them. A turn is two runs, of which the second counts: as in a
    training loop it follows one of its own, and not another contender whose memory went back to the system, from where
    (in a virtual machine, from its host) getting it again can take longer than the run. Each call must return only when
    its work is done.
    """
    for _ in range(warmup):
        for run in contenders.values():
            run()
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            run()
            start = time.perf_counter()
            run()
            samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in samples.items()}
