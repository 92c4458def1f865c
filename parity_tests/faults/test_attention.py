"""Faults of the layer: `verify` calls every one a mismatch, says where it is and what it is."""

from typing import Any

import pytest

from parity_tests.faults.attention import FAULTS, LayerFault, check, pair
from parity_tests.faults.fault import TWINS, Containing

pytestmark = pytest.mark.usefixtures("quick_compilation")


def named(name: str) -> LayerFault:
    return next(fault for fault in FAULTS if str(fault) == name)


@pytest.mark.parametrize(
    "sizes",
    [{}, pytest.param({"kernel_size": 5, "padding": 2}, marks=pytest.mark.slow(reason="compiles all again"))],
    ids=["kernel 3", "kernel 5"],
)
def test_the_harness_passes_when_no_fault_is_planted(sizes: dict[str, Any]) -> None:
    report = check(pair(sizes))
    assert report.verdict == "pass", [row for row in report.checks if row.verdict != "pass"]


# Either twin's share of the kinds; the other twin's of the same kind with the slow tests.
CASES = [
    pytest.param(
        fault,
        id=str(fault),
        marks=[] if (index // 2 + index) % 2 == 0 else pytest.mark.slow(reason="44 planted faults take a minute"),
    )
    for index, fault in enumerate(FAULTS)
]


@pytest.mark.parametrize("fault", CASES)
def test_a_planted_fault_is_called_a_mismatch_where_it_is_and_for_what_it_is(
    fault: LayerFault, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = fault.run(monkeypatch)
    assert report.verdict == "mismatch"
    assert (report.first_divergence, report.cause) == (fault.path, Containing(fault.cause))


@pytest.mark.parametrize("twin", ["torch", "jax"])
def test_a_fault_in_float32_arithmetic_alone_leaves_float64_passing(twin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = pair({})
    named(f"{twin}: bfloat16 inside float32").plant(layers, monkeypatch)
    wrong = {(row.level, row.dtype) for row in check(layers).checks if row.verdict == "mismatch"}
    assert wrong == {("forward", "float32"), ("layers", "float32")}


@pytest.mark.parametrize("name", ["torch: scale dropped", "jax: window axes swapped", "jax: heads interleaved"])
def test_a_fault_shows_in_float32_alone_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = pair({})
    named(name).plant(layers, monkeypatch)
    assert check(layers, "float32").verdict == "mismatch"


def test_nan_in_the_same_weight_of_both_twins_is_a_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = pair({})
    for twin in TWINS:
        named(f"{twin}: NaN in one weight").plant(layers, monkeypatch)
    assert check(layers, "float64").verdict == "mismatch"


def test_the_same_tensor_missing_in_both_twins_is_a_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = pair({})
    for twin in TWINS:
        named(f"{twin}: a tensor missing").plant(layers, monkeypatch)
    assert check(layers, "float64").verdict == "mismatch"
