"""A pytest plugin: the fixture `assert_parity`, which fails with a short report unless two models are twins."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from outlook_parity.report.report import Report

SHOWN = 12


@pytest.fixture
def assert_parity() -> Callable[..., "Report"]:
    """A function of (torch_model, jax_model, inputs) and the options of `outlook_parity.verify`."""
    return assert_twins


def assert_twins(torch_model: Any, jax_model: Any, inputs: Any, **options: Any) -> "Report":
    """Verify two models; fail unless the verdict is "pass", and skip never: a check that did not run is no pass.

    Returns:
        The report.
    """
    __tracebackhide__ = True
    from outlook_parity.api import verify

    report = verify(torch_model, jax_model, inputs, **options)
    if report.verdict != "pass":
        pytest.fail(short(report), pytrace=False)
    return report


def short(report: "Report") -> str:
    """Return the verdict, where and why, and the first rows that mismatch."""
    wrong = [check for check in report.checks if check.verdict == "mismatch"]
    # Modules that are wrong alone first: the rest follows from them.
    wrong.sort(key=lambda check: check.view not in ("torch", "jax"))
    lines = [str(report)]
    if report.first_divergence is not None:
        lines.append(f"first wrong: {report.first_divergence}")
    for check in wrong[:SHOWN]:
        found = check.note or f"found {check.measured:.3g}, at most {check.bound:.3g}"
        view = f" ({check.view})" if check.view else ""
        lines.append(f"  {check.level}, {check.dtype}: {check.name}{view}: {found}")
    if len(wrong) > SHOWN:
        lines.append(f"  … and {len(wrong) - SHOWN} more")
    return "\n".join(lines)
