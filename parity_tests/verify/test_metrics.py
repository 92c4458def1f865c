"""What is measured and told of two arrays, and the ways in which other checkers are known to pass what is wrong."""

import numpy as np
import pytest

from outlook_parity.compare import tensors as compare
from outlook_parity.compare.metrics import compare_logits, measure, unit_in_the_last_place
from outlook_parity.compare.patterns import how_they_differ, weight_difference
from outlook_parity.core.precision import PRECISIONS

DRAWN = np.random.default_rng(0).standard_normal((6, 6))


def verdict(torch: np.ndarray | None, jax: np.ndarray | None, truth: np.ndarray | None = None) -> str:
    traced = {twin: {} if array is None else {"output": array} for twin, array in (("torch", torch), ("jax", jax))}
    dtype = "float64" if truth is None else "float32"
    traced |= {} if truth is None else {"truth": {"output": truth}}
    (row,) = compare.compare_level("forward", dtype, traced, (6, 36))
    return row.verdict


# Each named after a way in which a published parity check lets a wrong model pass.


def test_nan_is_not_below_any_threshold() -> None:
    nan = np.where(np.eye(6) == 1, np.nan, DRAWN)
    assert verdict(nan, nan) == verdict(nan, DRAWN) == verdict(DRAWN, nan) == "mismatch"
    assert verdict(nan, nan, DRAWN) == "mismatch"


def test_equal_means_are_not_equal_values() -> None:
    assert DRAWN.mean() == pytest.approx(DRAWN[::-1].mean(), abs=1e-15)
    assert verdict(DRAWN, DRAWN[::-1]) == "mismatch"


def test_a_missing_output_is_not_skipped() -> None:
    assert verdict(None, DRAWN) == verdict(DRAWN, None) == "mismatch"


def test_a_larger_array_has_no_larger_tolerance() -> None:
    for size in (10, 1_000_000):
        array = np.random.default_rng(0).standard_normal(size)
        wrong = array.copy()
        wrong[3] += 1e-9
        assert verdict(array, wrong) == "mismatch"
        assert verdict(array, array) == "pass"


def test_constant_inputs_show_nothing() -> None:
    assert "constant" in str(compare.refusal({"input": np.ones((2, 3))}))
    assert "constant along axis 1" in str(compare.refusal({"input": np.arange(2.0)[:, None] * np.ones((2, 3))}))
    assert compare.refusal({"input": DRAWN}) is None


def test_distances_are_counted_in_units_in_the_last_place_of_the_dtype() -> None:
    for name in ("float64", "float32", "float16"):
        dtype = np.dtype(name)
        numbers = np.abs(DRAWN).astype(dtype)
        unit = unit_in_the_last_place(numbers.astype(np.float64), PRECISIONS[name])
        assert np.array_equal(unit, np.spacing(numbers).astype(np.float64))
    for name, bits in (("bfloat16", 7), ("tf32", 10)):
        unit = unit_in_the_last_place(np.array([1.0, 3.0]), PRECISIONS[name])
        assert unit.tolist() == [2.0**-bits, 2.0 ** (1 - bits)]
    next_one = np.nextafter(DRAWN.astype(np.float32), np.inf).astype(np.float64)
    measured = measure(next_one, DRAWN.astype(np.float32).astype(np.float64), PRECISIONS["float32"])
    assert measured["ulp max"] <= 1.0
    assert measured["ulp median"] == 1.0


def test_a_number_beside_a_zero_is_infinitely_many_units_away() -> None:
    assert measure(DRAWN, np.zeros((6, 6)), PRECISIONS["float64"])["ulp max"] == np.inf


def test_measures_of_a_known_difference() -> None:
    other = DRAWN.copy()
    other[2] = other[2][::-1]
    measured = measure(DRAWN, other, PRECISIONS["float64"])
    assert measured["max"] == np.abs(DRAWN - other).max()
    assert measured["rms"] == pytest.approx(np.sqrt(np.mean((DRAWN - other) ** 2)))
    assert measured["top 1 flips"] == 1
    tolerance = measured["tolerance"]
    np.testing.assert_allclose(DRAWN, other, rtol=tolerance * 1.001, atol=tolerance * 1.001)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(DRAWN, other, rtol=tolerance * 0.999, atol=tolerance * 0.999)


def test_logits_are_compared_by_their_predictions() -> None:
    one, other = np.log([[0.5, 0.25, 0.25], [0.7, 0.2, 0.1]]), np.log([[0.25, 0.5, 0.25], [0.7, 0.2, 0.1]])
    shifted = other + np.array([[1e3], [-1e3]])  # a softmax does not see it
    for logits in (other, shifted):
        measured = compare_logits(one, logits)
        assert measured["KL max"] == pytest.approx(0.5 * np.log(2) + 0.25 * np.log(0.5), abs=1e-12)
        assert measured["KL mean"] == pytest.approx(measured["KL max"] / 2)
        assert measured["top 1 agreement"] == 0.5
        assert measured["top 2 agreement"] == 1.0
    assert compare_logits(one, one) == {"KL mean": 0, "KL max": 0, "top 1 agreement": 1, "top 2 agreement": 1}


def test_logits_that_are_not_finite_are_left_out_and_never_raise() -> None:
    nan = DRAWN.copy()
    nan[1, 1], nan[2, 2] = np.nan, np.inf
    assert compare_logits(nan, DRAWN)["top 1 agreement"] == 1.0
    assert compare_logits(np.full((2, 3), np.nan), np.ones((2, 3))) == {}


def test_only_floating_outputs_count_as_logits() -> None:
    def metrics(level: str, integers: tuple[str, ...] = (), array: np.ndarray = DRAWN) -> dict[str, float]:
        traced = {twin: {"output": array * factor} for twin, factor in (("torch", 1), ("jax", 2))}
        (row,) = compare.compare_level(level, "float64", traced, (6, 36), integers)
        return dict(row.metrics)

    assert "KL mean" in metrics("forward")
    assert "KL mean" not in metrics("gradients")
    assert "KL mean" not in metrics("forward", ("output",))
    assert "KL mean" not in metrics("forward", array=DRAWN[:, :1])
    assert "KL mean" not in metrics("forward", array=DRAWN[0])


def test_nan_and_infinity_are_counted_and_told_apart() -> None:
    torch, jax = np.array([1.0, np.nan, np.inf, 2.0]), np.array([1.0, np.nan, -np.inf, np.nan])
    measured = measure(torch, jax, PRECISIONS["float64"])
    assert (measured["not finite torch"], measured["not finite jax"], measured["not finite apart"]) == (2, 3, 2)
    assert measured["max"] == 0.0


@pytest.mark.parametrize(
    ("jax", "words"),
    [
        (2 * DRAWN, "jax has 2 times what torch has"),
        (DRAWN.T, "transposed"),
        (np.concatenate([DRAWN[2:4], DRAWN[:2], DRAWN[4:]]), "3 parts along axis 0 are in the order [1, 0, 2]"),
        (DRAWN[:, ::-1], "reversed along axis 1"),
        (np.roll(DRAWN, 1, 0), "shifted by 1 along axis 0"),
        (np.random.default_rng(1).permuted(DRAWN, axis=1), "the same numbers in another order"),
        (DRAWN + np.arange(6) / 7, "one number per channel"),
        (np.where(np.arange(36).reshape(6, 6) == 8, 9.0, DRAWN), "they differ in 1 of 36 places, the first [1, 2]"),
        (np.where(np.eye(6) == 1, np.nan, DRAWN), "6 NaN or Inf in jax"),
        (np.zeros((6, 6)), "zero in jax"),
        (DRAWN**3, ""),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_how_arrays_differ_is_told_in_words(jax: np.ndarray, words: str) -> None:
    assert words in how_they_differ(DRAWN, jax)
    assert bool(words) == bool(how_they_differ(DRAWN, jax))


def test_a_weight_that_holds_another_ones_values_is_told() -> None:
    torch = {"a": DRAWN, "b": DRAWN**2}
    assert weight_difference("a", torch, {"a": DRAWN**2, "b": DRAWN**2}) == "jax has the values of b there"
    assert weight_difference("a", {"a": DRAWN**2, "b": DRAWN**2}, torch) == "torch has the values of b there"


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
def test_moments_of_single_numbers_are_compared_as_arrays_are(shape: tuple[int, ...]) -> None:
    name = "AdamW: second moment of scale"
    sizes = {"torch": 1 + 1e-7, "jax": 1 - 1e-7, "truth": 1.0, "up": 1 + 2e-7, "down": 1 - 2e-7}
    results = {label: {name: np.full(shape, size)} for label, size in sizes.items()}
    (row,) = compare.compare_level("training", "float32", results, (1, 1))
    assert row.verdict == "pass"
