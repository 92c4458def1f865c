"""Faults of a whole VOLO: `verify` calls every one a mismatch, says where it is and what it is."""

import pytest

from parity_tests.faults import attention
from parity_tests.faults.fault import Containing
from parity_tests.faults.volo import FAULTS, VOLOFault
from parity_tests.support.small_volo import wrong

pytestmark = pytest.mark.usefixtures("quick_compilation")

BUFFERS_ONLY = ("biased running variance", "momentum of BatchNorm 0.9", "stale statistics")
CASES = [
    pytest.param(
        fault,
        id=str(fault),
        marks=[] if fault.fast else pytest.mark.slow(reason="62 planted faults in a whole model take minutes"),
    )
    for fault in FAULTS
]


@pytest.mark.parametrize("fault", CASES)
def test_a_planted_fault_is_called_a_mismatch_where_it_is_and_for_what_it_is(
    fault: VOLOFault, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = fault.run(monkeypatch)
    assert report.verdict == "mismatch"
    assert (report.first_divergence, report.cause) == (fault.path, Containing(fault.cause))
    if fault.name in BUFFERS_ONLY:
        assert all(name.endswith(("running_mean", "running_var")) for name in wrong(report))
    if fault.name in ("weight decay as L2", "no momentum"):
        assert {name.partition(":")[0] for name in wrong(report)} == {report.cause.split()[1]}


def test_of_forty_kinds_and_more_nine_tenths_are_told_where_and_three_quarters_for_what_they_are() -> None:
    """What the tables of both files promise, kind by kind, is what their tests hold the reports to."""
    of_layer, of_volo = ({fault.name: fault for fault in faults} for faults in (attention.FAULTS, FAULTS))
    assert len(attention.FAULTS) == 2 * len(of_layer)
    assert len(FAULTS) == 2 * len(of_volo)
    assert not of_layer.keys() & of_volo.keys()
    kinds = [*of_layer.values(), *of_volo.values()]
    assert len(kinds) >= 40
    assert sum(fault.path is not None for fault in kinds) >= 0.9 * len(kinds)
    assert sum(fault.cause not in ("", fault.path) for fault in kinds) >= 0.75 * len(kinds)
