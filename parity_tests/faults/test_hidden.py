"""Faults that hide: `verify` calls every one a mismatch, says where it is and what it is."""

from collections.abc import Callable

import numpy as np
import pytest

from outlook_parity import Report
from parity_tests.faults.fault import Containing
from parity_tests.faults.hidden import AFAR, FAULTS, HiddenFault, check, drawn, models, symmetric

pytestmark = pytest.mark.usefixtures("quick_compilation")


def wrong(report: Report) -> set[tuple[str, str]]:
    rows = [row for row in report.checks if row.verdict == "mismatch"]
    return {(row.level, row.name) for row in rows if not row.name.endswith("running_var")}


@pytest.mark.parametrize("inputs", [drawn, symmetric], ids=["drawn", "symmetric"])
def test_without_a_fault_only_the_biased_variance_of_flax_differs(inputs: Callable[[], np.ndarray]) -> None:
    levels = ("forward", "layers", "gradients", "training")
    report = check(models(), inputs(), levels, ("float64", "float32"))
    assert wrong(report) == set()
    assert report.notes == ()


def test_twins_that_lose_the_same_digits_in_bfloat16_pass() -> None:
    assert check(models(both=AFAR), drawn(), ("layers",), ("float64", "float32", "bfloat16")).verdict == "pass"


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_that_hides_is_called_a_mismatch_where_it_is_and_for_what_it_is(
    fault: HiddenFault, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = fault.run(monkeypatch)
    assert report.verdict == "mismatch"
    assert wrong(report) or fault.path == "bn"
    assert (report.first_divergence, report.cause or "") == (fault.path, Containing(fault.cause))
    assert fault.notes in " ".join(report.notes)
