"""Summary of the rows of a report: a line per level and precision, the first difference, counts. No framework."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from outlook_parity.core.check import FROZEN, IGNORED, PROPAGATED, UNUSED, Check, RowVerdict

# What the note of a row begins with that is skipped for a reason: by the user, or with evidence that it is no fault.
_REASONS = tuple(start.removesuffix(": ") for start in (IGNORED, UNUSED, FROZEN))

_LEVELS = ("weights", "forward", "layers", "gradients", "training", "again", "self-check")

# The verdict of several rows is the first of these that one of them has.
_BY_WEIGHT: tuple[RowVerdict, ...] = ("mismatch", "not-run", "pass", "zero", "skipped")


@dataclass(frozen=True)
class Line:
    """The rows of one level in one precision.

    Attributes:
        level: as in `Check`.
        dtype: likewise.
        rows: how many.
        differing: how many of them mismatch.
        verdict: of all together.
        worst: the row that is nearest to its bound, or furthest beyond it; None if none was measured.
    """

    level: str
    dtype: str
    rows: int
    differing: int
    verdict: RowVerdict
    worst: Check | None


def lines(checks: Sequence[Check]) -> list[Line]:
    """Return a line per level and precision, in the order of `_LEVELS`; precisions as they first appear."""
    groups: dict[tuple[str, str], list[Check]] = {}
    for check in checks:
        groups.setdefault((check.level, check.dtype), []).append(check)
    dtypes = list(dict.fromkeys(check.dtype for check in checks))
    in_order = sorted(groups, key=lambda group: (dtypes.index(group[1]), _LEVELS.index(group[0])))
    return [_line(level, dtype, groups[level, dtype]) for level, dtype in in_order]


def _line(level: str, dtype: str, rows: Sequence[Check]) -> Line:
    verdicts = [row.verdict for row in rows]
    verdict = next(verdict for verdict in _BY_WEIGHT if verdict in verdicts)
    # Among the rows that decide the verdict; what rounding excuses is beyond its bound, and no fault.
    deciding = [row for row in rows if row.verdict == verdict and not row.excused] or list(rows)
    worst = max(deciding, key=share_of_bound) if verdict in ("mismatch", "not-run", "pass") else None
    return Line(level, dtype, len(rows), verdicts.count("mismatch"), verdict, worst)


def share_of_bound(check: Check) -> float:
    """Return by how much of its bound a row differs: a mismatch is above 1, or infinite if it was not measured."""
    if check.measured is None or math.isnan(check.measured):
        return math.inf
    if check.bound:
        return check.measured / check.bound
    return math.inf if check.measured else 0.0


def differing(checks: Sequence[Check], path: str | None, cause: str | None) -> list[Check]:
    """Return the rows that mismatch: first the one that shows the cause, then those wrong isolated, then the rest.

    Args:
        checks: all rows.
        path: of the module that is wrong first, None if unknown.
        cause: in words, None if unknown.
    """

    def rank(check: Check) -> tuple[bool, ...]:
        isolated = check.view not in ("", PROPAGATED)
        named = check.level == "weights" and cause is not None and check.name in cause.replace(":", " ").split()
        return not named, not (isolated and check.name == path), check.name != path, not isolated

    return sorted((check for check in checks if check.verdict == "mismatch"), key=rank)


def counts(checks: Sequence[Check]) -> dict[str, int]:
    """Return what the rows that are no plain pass and no mismatch are -> how many, of those that there are."""
    found = dict.fromkeys((*_REASONS, "skipped", "zero in both", "noted"), 0)
    for check in checks:
        if check.verdict == "skipped":
            found[next((word for word in _REASONS if check.note.startswith(f"{word}: ")), "skipped")] += 1
        found["zero in both"] += check.verdict == "zero"
        found["noted"] += check.verdict == "pass" and bool(check.note)
    return {what: count for what, count in found.items() if count}
