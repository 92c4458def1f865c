"""Rows that are no mismatch for a reason that the report gives: unused and frozen weights, waivers. No framework."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from outlook_common.text import closest, listed
from outlook_parity.core.check import FROZEN, IGNORED, UNUSED, Check


def tensor_of(check: Check) -> str:
    """Return the weight that a row is about, as in "AdamW: first moment of head.weight"."""
    name = check.name.partition(": ")[2] if check.level == "training" else check.name
    return name.rpartition(" of ")[2] or name


def with_unused(checks: Iterable[Check], unused: Collection[str]) -> list[Check]:
    """Return rows in which a weight that one twin lacks is skipped, where no output of the other depends on it.

    Args:
        checks: rows.
        unused: the parameters that no output of their twin depends on.
    """
    notes = {
        "missing in jax": f"{UNUSED}no output depends on it in torch, and JAX has no such weight",
        "missing in torch": f"{UNUSED}no output depends on it in JAX, and torch has no such weight",
    }

    def lacking(check: Check) -> bool:
        return check.verdict == "mismatch" and check.note in notes and tensor_of(check) in unused

    return [replace(check, verdict="skipped", note=notes[check.note]) if lacking(check) else check for check in checks]


def with_frozen(checks: Iterable[Check], frozen: Collection[str]) -> list[Check]:
    """Return rows in which the gradient of a frozen parameter is skipped.

    Args:
        checks: rows of the gradients.
        frozen: the parameters with requires_grad=False in torch whose gradient in JAX is exactly zero.
    """
    note = f"{FROZEN}requires_grad=False in torch, and the gradient in JAX is exactly zero"

    def stopped(check: Check) -> bool:
        return check.verdict == "mismatch" and check.level == "gradients" and check.name in frozen

    return [replace(check, verdict="skipped", note=note) if stopped(check) else check for check in checks]


def is_ignored(name: str, patterns: Iterable[str]) -> str | None:
    """Return the first pattern that a name matches, None if none does."""
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)


def check_waivers(ignore: Mapping[str, str]) -> None:
    """Raise a ValueError if a waiver has no pattern or no reason."""
    for pattern, reason in ignore.items():
        if not pattern.strip() or not str(reason).strip():
            example = "{'*.mask_token': 'unused'}"
            raise ValueError(f"ignore must be patterns with reasons, as {example}, got {pattern!r}: {reason!r}")


def with_waivers(checks: Sequence[Check], ignore: Mapping[str, str]) -> list[Check]:
    """Return rows in which those whose names match a pattern are skipped with its reason.

    Raises:
        ValueError: a pattern matches no row.
    """
    used: set[str] = set()
    waived = []
    for check in checks:
        pattern = is_ignored(check.name, ignore)
        if pattern is None:
            waived.append(check)
            continue
        used.add(pattern)
        waived.append(replace(check, verdict="skipped", note=f"{IGNORED}{ignore[pattern]}"))
    if unused := [pattern for pattern in ignore if pattern not in used]:
        names = dict.fromkeys(check.name for check in checks)
        near = closest(unused[0], names)
        hint = f"; the nearest name is {near!r}" if near else ""
        raise ValueError(f"ignore matches none of the {len(checks)} rows: {listed(map(repr, unused))}{hint}")
    return waived
