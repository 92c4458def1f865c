"""Differences in float64 that float32 constants of a model make. Imports no framework.

A table of rotary embeddings may have been rounded to float32 before the model sees it: its numbers differ between the
twins by float32's rounding, and no run in float64 can undo that. Such a difference is a note if the program of a twin
holds such constants, the difference is no larger than they can make it, and the twins agree in float32.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from outlook_common.text import listed
from outlook_parity.compare.modules import Suspect, shown_path
from outlook_parity.core.check import PROPAGATED, Check
from outlook_parity.core.precision import PRECISIONS, TRUTH
from outlook_parity.core.recorder import ROOT
from outlook_parity.core.truth import Truth

# The largest difference that counts as float32's rounding of constants, in units of it.
MOST_UNITS = 64.0

BOUND = MOST_UNITS * PRECISIONS["float32"].epsilon


# Of each twin: module, None for an unknown one -> constants in words.
Constants = Mapping[str, Mapping[str | None, Collection[str]]]


@dataclass(frozen=True)
class Residue:
    """Rows and suspects without those that float32 constants explain, and a note on them."""

    checks: list[Check]
    suspects: list[Suspect]
    notes: list[str]


def excuse(checks: Sequence[Check], suspects: Sequence[Suspect], truths: Mapping[str, Truth]) -> Residue:
    """Excuse differences in float64 that float32 constants make.

    Args:
        checks: all rows.
        suspects: modules that are wrong isolated.
        truths: of each twin.
    """
    constants = {twin: truth.constants for twin, truth in truths.items() if truth.constants}
    notes = [
        f"casts to float32 inside {twin} are part of its float64 results: lifted to float64 it fails ({why})"
        for twin, truth in truths.items()
        if (why := truth.unlifted)
    ]
    wrong = [check for check in checks if check.dtype == TRUTH and check.verdict == "mismatch"]
    if not constants or not wrong:
        return Residue(list(checks), list(suspects), notes)
    agreeing = {(c.level, c.name, c.view) for c in checks if c.dtype == "float32" and c.verdict in ("pass", "zero")}
    paths = [path for found in constants.values() for path in found if path is not None]
    explained = [check for check in wrong if _explained(check, agreeing, paths)]
    if sum(map(_is_isolated, wrong)) > sum(map(_is_isolated, explained)):
        explained = [check for check in explained if _is_isolated(check)]  # the others may be another module's doing
    if not explained:
        return Residue(list(checks), list(suspects), notes)
    because = f"as float32 constants make it: {_words(constants)}"
    ids = set(map(id, explained))
    kept = [_excused(check, because) if id(check) in ids else check for check in checks]
    gone = {(check.name, check.view) for check in explained if check.level == "layers"}
    left = [s for s in suspects if s.dtype != TRUTH or (shown_path(s.path), s.view) not in gone]
    largest = max(check.measured or 0.0 for check in explained)
    notes.append(f"{len(explained)} differences in float64 of at most {largest:.1e} are {because}; float32 agrees")
    return Residue(kept, left, notes)


def possible(checks: Sequence[Check], constants: Constants) -> str | None:
    """Return as a note that float32 constants may be why float64 differs, where no run in float32 can tell.

    None where there are no such constants, or where a difference is larger than they can make it.
    """
    wrong = [check for check in checks if check.dtype == TRUTH and check.verdict == "mismatch"]
    known = {twin: found for twin, found in constants.items() if found}
    if not known or not wrong or any(check.measured is None or check.measured > BOUND for check in wrong):
        return None
    largest = max(check.measured or 0.0 for check in wrong)
    return (
        f"{len(wrong)} differences in float64 of at most {largest:.1e} are as small as float32 constants make them: "
        f"{_words(known)}; traces in float32 tell whether the twins agree there"
    )


def _explained(check: Check, agreeing: Iterable[tuple[str, str, str]], paths: Sequence[str]) -> bool:
    """Whether a row is explained by float32 constants; an isolated module must use them itself."""
    if check.measured is None or check.measured > BOUND or check.level in ("weights", "self-check"):
        return False
    # Called again, the same outputs are compared, in float64 alone.
    key = ("forward", check.name.partition(": ")[2], "") if check.level == "again" else _key(check)
    if key not in agreeing:
        return False
    return not _is_isolated(check) or any(_is_inside(path, check.name) for path in paths)


def _is_isolated(check: Check) -> bool:
    return check.level == "layers" and check.view != PROPAGATED


def _is_inside(path: str, module: str) -> bool:
    return module == shown_path(ROOT) or path == module or path.startswith(f"{module}.")


def _key(check: Check) -> tuple[str, str, str]:
    return check.level, check.name, check.view


def _excused(check: Check, why: str) -> Check:
    return replace(check, verdict="pass", excused=True, note=why)


def _words(constants: Constants) -> str:
    """Return in words which constants there are: in modules, of unknown place where that is all."""
    found = []
    for twin, by_path in constants.items():
        known = {path: names for path, names in by_path.items() if path is not None} or by_path
        for path, names in known.items():
            at = f" in {path}" if path else ""
            found += [f"{name}{at} ({twin})" for name in sorted(names)]
    return listed(found, 4, between="; ")
