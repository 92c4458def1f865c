"""Honest pairs of other packages pass with nothing written but the two factories."""

import pytest

from parity_tests.world.pairs import PAIRS, Pair
from parity_tests.world.run import verify_pair
from parity_tests.world.small import SMALL_PAIRS

pytest.importorskip("transformers.modeling_flax_utils", reason="transformers 4.57 is not installed: make test-world")

pytestmark = pytest.mark.filterwarnings("ignore")  # of other packages


@pytest.mark.parametrize("pair", [*PAIRS, *SMALL_PAIRS], ids=lambda pair: pair.name)
def test_an_honest_pair_passes_at_the_first_try(pair: Pair) -> None:
    report = verify_pair(pair)
    assert report.verdict == "pass", str(report)
