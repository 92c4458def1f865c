"""Outlook attention over a map whose rows eight devices share: the result of one, and only borders are sent."""

from typing import Any

import pytest

from parity_tests.support.shared_rows import CASES, B, D, N, W
from parity_tests.support.subprocesses import run_on_devices

pytestmark = pytest.mark.long(reason="compiles for eight devices")

ROW = B * W * N * D  # numbers in a row of the values


@pytest.fixture(scope="module")
def found() -> Any:
    return run_on_devices("parity_tests.support.shared_rows", 8)


@pytest.mark.parametrize("name", [*CASES, "layer"])
def test_value_and_gradients_are_those_of_one_device(found: Any, name: str) -> None:
    assert found["errors"][name] <= 1e-12


@pytest.mark.parametrize(("name", "rows"), [("VOLO's", 1), ("large kernel", 3)])
def test_what_is_sent_are_the_borders_of_values_and_results_and_no_probabilities(
    found: Any, name: str, rows: int
) -> None:
    assert found["sent"][name] == {"collective-permute": 2 * rows * ROW}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("odd rows", "each device has 1 rows, which the stride 2 does not divide: 2 would do"),
        ("few rows", "windows reach 2 rows beyond the 1 rows of a device"),
        ("reference", "implementation 'reference' cannot share rows"),
    ],
)
def test_what_cannot_be_shared_is_refused_with_numbers(found: Any, name: str, words: str) -> None:
    assert words in found["refused"][name]
