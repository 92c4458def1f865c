"""Pytest plugin: the fixture `assert_parity` fails with a short report unless two models agree."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from outlook_parity.report.report import Report

MAX_ROWS = 12


@pytest.fixture
def assert_parity() -> Callable[..., "Report"]:
    """A function of (torch_model, jax_model, inputs) and the options of `outlook_parity.verify`."""
    return assert_twins


def assert_twins(torch_model: Any, jax_model: Any, inputs: Any, **options: Any) -> "Report":
    """Verify two models; fail unless the verdict is "pass". Never skips: a check that did not run fails.

    Returns:
        The report.
    """
    __tracebackhide__ = True
    from outlook_parity.api import verify

    report = verify(torch_model, jax_model, inputs, **options)
    if report.verdict != "pass":
        pytest.fail(failure_message(report), pytrace=False)
    return report


def failure_message(report: "Report") -> str:
    """Return the verdict, the cause, the first wrong module and the first rows that mismatch."""
    from outlook_parity.report.text import finding

    mismatches = [check for check in report.checks if check.verdict == "mismatch"]
    # Modules that are wrong in isolation first: the rest follows from them.
    mismatches.sort(key=lambda check: check.view not in ("torch", "jax"))
    lines = [str(report)]
    if report.first_divergence is not None:
        lines.append(f"first wrong: {report.first_divergence}")
    for check in mismatches[:MAX_ROWS]:
        view = f" ({check.view})" if check.view else ""
        lines.append(f"  {check.level}, {check.dtype}: {check.name}{view}: {finding(check)}")
    if len(mismatches) > MAX_ROWS:
        lines.append(f"  … and {len(mismatches) - MAX_ROWS} more")
    return "\n".join(lines)
