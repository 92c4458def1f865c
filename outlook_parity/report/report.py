"""Report of a verification: verdict, cause and checks, in words and as files."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from outlook_parity.core.check import NOT_COMPARED, Check, SelfNoise, Verdict
from outlook_parity.core.sharding import Sharding
from outlook_parity.diagnose.advice import advice
from outlook_parity.report.html import render
from outlook_parity.report.junit import to_junit
from outlook_parity.report.summary import counts
from outlook_parity.report.text import shortened

JSON_VERSION = 5

# What a note begins with that a level was left out; its name follows in quotes.
LEVEL_LEFT_OUT = "the level "


@dataclass(frozen=True)
class Report:
    """The outcome of `verify`.

    Attributes:
        verdict: "pass", "mismatch", or "not-run" if something that was asked for could not be compared.
        reason: why nothing (or too little) was compared, or None.
        first_divergence: path of the first module that is wrong, None if unknown.
        cause: what is wrong, in words, None if unknown.
        differences: hyperparameters that differ between the models, each in words; by themselves no mismatch.
        notes: anything else to know: a twin is not deterministic, a level was left out.
        self_noise: of each twin and dtype, measured before anything is compared.
        checks: one row per tensor, level and dtype.
        curves: optimizer -> twin -> loss of each step, in the first training dtype.
        environment: versions and devices.
        sharding: over which devices the JAX twin ran, None on one.
    """

    verdict: Verdict
    checks: tuple[Check, ...] = ()
    reason: str | None = None
    first_divergence: str | None = None
    cause: str | None = None
    differences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    self_noise: tuple[SelfNoise, ...] = ()
    curves: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    sharding: Sharding | None = None

    def to_json(self) -> str:
        """Return the report as JSON of the schema `report.schema.json`; NaN and Inf become null."""
        return json.dumps(self._as_json(), indent=2, allow_nan=False)

    def to_html(self, path: str | PathLike[str], *, title: str = "") -> None:
        """Write the report as one HTML page that needs no network.

        Raises:
            OSError: the file cannot be written.
        """
        tried = advice(self.cause, self.first_divergence) if self.verdict == "mismatch" else None
        page = render(
            {"title": title, "sentence": findings(self) + omissions(self), "advice": tried, **self._as_json()}
        )
        Path(path).write_text(page, encoding="utf-8")

    def to_junit(self, path: str | PathLike[str]) -> None:
        """Write the report as JUnit XML, for CI systems.

        Raises:
            OSError: the file cannot be written.
        """
        Path(path).write_text(to_junit(self.checks, sentence(self)), encoding="utf-8")

    def _as_json(self) -> dict[str, Any]:
        return {"version": JSON_VERSION, **_finite(asdict(self))}

    def __str__(self) -> str:
        return sentence(self)


def sentence(report: Report) -> str:
    """Return the verdict, the findings and the cause in words: at most 2,000 characters."""
    label = {"pass": "PASS", "mismatch": "MISMATCH", "not-run": "NOT RUN"}[report.verdict]
    cause = f"; {report.cause}" if report.verdict == "mismatch" and report.cause else ""
    return shortened(f"{label}: {findings(report)}{omissions(report)}{cause}")


def omissions(report: Report) -> str:
    """Return in brackets which levels were left out, and how many rows are no plain pass and no mismatch; or ""."""
    levels = [note.split("'")[1] for note in report.notes if note.startswith(LEVEL_LEFT_OUT)]
    parts = [f"{' and '.join(levels)} left out"] if levels else []
    parts += [f"{count} rows {what}" for what, count in counts(report.checks).items()]
    if any(note.startswith(NOT_COMPARED) for note in report.notes):
        parts.append("not all outputs compared")
    return f" ({'; '.join(parts)})" if parts else ""


def findings(report: Report) -> str:
    """Return what the checks found in words, without verdict and cause."""
    if report.verdict == "not-run":
        return shortened(str(report.reason))
    if report.verdict == "mismatch":
        mismatches = sum(check.verdict == "mismatch" for check in report.checks)
        return f"{mismatches} of {len(report.checks)} checks differ"
    errors: list[float] = []
    factors: list[float] = []
    dtypes: dict[str, None] = {}  # an ordered set
    for check in report.checks:
        if check.torch_noise:
            dtypes[check.dtype] = None
        if check.measured is not None and check.torch_noise:
            factors.append(check.measured)
        if check.measured is not None and check.dtype == "float64" and not check.excused:
            errors.append(check.measured)
    parts = []
    if errors:
        parts.append(f"equal to rounding in float64 (largest relative error {max(errors):.1e})")
    if factors:
        parts.append(f"equally exact in {', '.join(dtypes)} (rounding errors within a factor of {max(factors):.2f})")
    return f"the twins are {' and '.join(parts)}"


def _finite(value: Any) -> Any:
    """Return a value without tuples, NaN and Inf, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
