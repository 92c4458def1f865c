"""What a verification found: the rows, the verdict, and both in words and files."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from outlook_parity.core.check import Check, SelfNoise, Verdict
from outlook_parity.report.html import render
from outlook_parity.report.junit import to_junit

JSON_VERSION = 4


@dataclass(frozen=True)
class Report:
    """The outcome of `verify`.

    Attributes:
        verdict: "pass", "mismatch", or "not-run" if something that was asked for could not be compared.
        reason: why nothing (or too little) was compared, or None.
        first_divergence: path of the first module known to be wrong, or None.
        cause: what is wrong, in words, where that is known.
        differences: what the models say differently about themselves, each in words; no difference of numbers by
            itself.
        notes: what else should be known: that a twin is not deterministic, or a level left out.
        self_noise: of each twin and dtype, measured before anything else.
        checks: one row per tensor, level and dtype.
        curves: optimizer -> twin -> loss, step by step, in the first dtype that was trained in.
        environment: versions and devices.
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

    def to_json(self) -> str:
        """Return everything as JSON, as `report.schema.json` beside this file says; NaN and Inf become null."""
        return json.dumps(self._as_json(), indent=2, allow_nan=False)

    def to_html(self, path: str | PathLike[str], *, title: str = "") -> None:
        """Write everything as one HTML page that needs no network.

        Raises:
            OSError: the file cannot be written.
        """
        page = render({"title": title, "sentence": _findings(self), **self._as_json()})
        Path(path).write_text(page, encoding="utf-8")

    def to_junit(self, path: str | PathLike[str]) -> None:
        """Write everything as JUnit XML, which CI systems show.

        Raises:
            OSError: the file cannot be written.
        """
        Path(path).write_text(to_junit(self.checks, sentence(self)), encoding="utf-8")

    def _as_json(self) -> dict[str, Any]:
        return {"version": JSON_VERSION, **_finite(asdict(self))}

    def __str__(self) -> str:
        return sentence(self)


def sentence(report: Report) -> str:
    """Return the verdict in words."""
    if report.verdict == "not-run":
        return f"NOT RUN: {report.reason}"
    if report.verdict == "mismatch":
        wrong = [check for check in report.checks if check.verdict == "mismatch"]
        cause = f"; {report.cause}" if report.cause else ""
        return f"MISMATCH: {len(wrong)} of {len(report.checks)} checks differ{cause}"
    exact = [
        check.measured
        for check in report.checks
        if check.dtype == "float64" and check.measured is not None and not check.excused
    ]
    factors = [check.measured for check in report.checks if check.torch_noise and check.measured is not None]
    lower = list(dict.fromkeys(check.dtype for check in report.checks if check.torch_noise))
    findings = []
    if exact:
        findings.append(f"equal to rounding in float64 (largest relative error {max(exact):.1e})")
    if factors:
        findings.append(f"equally exact in {', '.join(lower)} (rounding errors within a factor of {max(factors):.2f})")
    return f"PASS: the twins are {' and '.join(findings)}"


def _findings(report: Report) -> str:
    """Return the verdict in words without the verdict itself and the cause."""
    return sentence(report).partition(": ")[2].removesuffix(f"; {report.cause}")


def _finite(value: Any) -> Any:
    """Return `value` as JSON has it."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
