"""Which wrong module matters: suspects in the order of what they contribute. Imports no framework."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from outlook_parity.compare.modules import Suspect

# A module whose isolated error is smaller than this part of the largest is never the first suspect; nor is one that
# changes the outputs by less than this part of what another does.
LEAST_PART = 1e-3

# Modules whose effect on the outputs is measured, a run each.
MOST_MEASURED = 5


def ranked(suspects: Sequence["Suspect"], effect: Callable[[Sequence["Suspect"]], float | None]) -> list["Suspect"]:
    """Return suspects with those first that contribute to the outputs, each group in the order of execution.

    Args:
        suspects: in the order of execution.
        effect: measures how far the outputs change if one module's results are the other twin's; None if unknown. It
            is called where several modules are left.
    """
    largest = max((suspect.error for suspect in suspects), default=0.0)
    serious = [suspect for suspect in suspects if suspect.error >= LEAST_PART * largest]
    by_path: dict[str, list["Suspect"]] = {}
    for suspect in sorted(serious, key=lambda suspect: -suspect.error):
        by_path.setdefault(suspect.path, []).append(suspect)
    effects: dict[str, float] = {}
    if len(by_path) > 1:
        for path in list(by_path)[:MOST_MEASURED]:
            measured = effect(by_path[path])
            effects[path] = math.inf if measured is None or math.isnan(measured) else measured
    known = [value for value in effects.values() if math.isfinite(value)]
    least = LEAST_PART * max(known, default=0.0)

    def rank(suspect: "Suspect") -> int:
        if suspect.error < LEAST_PART * largest:
            return 2
        return int(effects.get(suspect.path, math.inf) < least)

    return sorted(suspects, key=rank)
