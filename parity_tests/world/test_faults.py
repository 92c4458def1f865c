"""Faults planted into models of other packages are called, placed and told."""

import pytest

from parity_tests.world.faults import FAULTS, Fault
from parity_tests.world.run import found, verify_fault

pytest.importorskip("transformers.modeling_flax_utils", reason="transformers 4.57 is not installed: make test-world")

pytestmark = pytest.mark.filterwarnings("ignore")  # of other packages


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_planted_fault_is_called_placed_and_told(fault: Fault) -> None:
    report = verify_fault(fault)
    assert found(fault, report) == (True, True, True), f"{report.first_divergence}: {report.cause}"
