"""Interleaved timing: every contender in turn, many rounds, medians."""

import statistics
import time
from collections.abc import Callable, Mapping

Contenders = Mapping[str, Callable[[], object]]


def interleave(contenders: Contenders, *, rounds: int, warmup: int = 2, untimed: int = 0) -> dict[str, float]:
    """Return the median seconds of each contender over `rounds` rounds, in each of which all of them take their turn.

    A machine that slows down for a while so slows all of them; each call must return only when its work is done.

    Args:
        contenders: what to time, by name.
        rounds: how many times each is timed.
        warmup: untimed rounds at the start.
        untimed: untimed runs before each timed one. 0 is for layers: as inside a model, what they read is not in the
            cache. 1 is for models, which follow themselves in a training loop: memory that others gave back to the
            system (in a virtual machine, to its host) can take longer to get again than the step itself.
    """
    for _ in range(warmup):
        for run in contenders.values():
            run()
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            for _ in range(untimed):
                run()
            start = time.perf_counter()
            run()
            samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in samples.items()}
