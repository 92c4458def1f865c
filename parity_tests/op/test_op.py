"""Every implementation of both twins against an independent float64 oracle, forward and backward."""

from collections.abc import Sequence
from functools import cache

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlook_common import window_grid
from outlook_common.op_cases import BY_NAME, CASES, Case
from parity_tests.support.oracle import Operands, Results, attend, magnitudes
from parity_tests.support.runners import CPU, DTYPES, IMPLEMENTATIONS, Device, Runner, draw, relative_error, run_jax

every_implementation = pytest.mark.parametrize(
    ("name", "run"),
    [pytest.param(name, run, id=f"{framework}-{name}") for (framework, name), run in IMPLEMENTATIONS.items()],
)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
# Geometry is float64's affair: in lower precision some cases stand for all.
some_cases = pytest.mark.parametrize(
    "case",
    [BY_NAME[name] for name in ("volo_d1", "seed_512", "small_map", "kernel_5_stride_2", "rectangular", "one_row")],
    ids=lambda case: case.name,
)

# The float64 bounds of the contract, relative to the largest entry of a tensor.
FORWARD, GRADIENT = 1e-12, 1e-10


@cache
def drawn(case: Case, seed: int, dtype: str = "float64", dropout: float = 0.0) -> tuple[Operands, Results, Results]:
    """Return operands, their results in float64 and the magnitudes of these, the same for every implementation."""
    operands = draw(case, seed, dtype, dropout=dropout)
    return operands, attend(operands, case.grid), magnitudes(operands, case.grid)


def assert_float64_equal(results: Results, truth: Results, case: Case) -> None:
    assert relative_error(results.out, truth.out) <= FORWARD
    assert relative_error(results.d_value, truth.d_value) <= GRADIENT
    if case.grid.places > 1:
        assert relative_error(results.d_logits, truth.d_logits) <= GRADIENT
    else:  # the softmax over a single place is constant
        assert (truth.d_logits == 0).all()
        assert (results.d_logits == 0).all()


def assert_within_rounding(results: Results, operands: Operands, case: Case, known: Sequence[Results] = ()) -> None:
    """Assert that every entry is off by no more than rounding its terms can explain.

    Two roundings to the dtype (of the weights, of the result; in the gradient of the logits, of the cotangent too),
    and a float32 accumulation whose exponentials and sums are good to some 64 units. `known` are the truth and its
    magnitudes, if they were computed before.
    """
    truth, scale = known or (attend(operands, case.grid), magnitudes(operands, case.grid))
    dtype = operands.value.dtype
    unit = ml_dtypes.finfo(dtype).eps
    accumulation = 64 * np.finfo(np.float32).eps
    smallest = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    for name, result, exact, magnitude in zip(Results._fields, results, truth, scale, strict=True):
        assert result.dtype == dtype, name
        error = np.abs(result.astype(np.float64) - exact)
        # Probabilities below the smallest number round to zero: an absolute error per term.
        lost = smallest * case.grid.places**2 * np.abs(operands.value).astype(np.float64).max() * case.D
        bound = (2 * unit + accumulation) * magnitude + lost
        assert (error <= bound).all(), f"{name}: {np.max(error / bound):.2f} times the bound"


@every_case
@every_implementation
def test_float64_equals_the_oracle_forward_and_backward(case: Case, name: str, run: Runner, device: Device) -> None:
    operands, truth, _ = drawn(case, seed=1)
    assert_float64_equal(run(operands, case, device, name), truth, case)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("case", [BY_NAME["volo_d1"], BY_NAME["seed_512"]], ids=lambda case: case.name)
def test_the_composite_optimized_by_xla_equals_the_oracle_too(case: Case, dtype: str, device: Device) -> None:
    operands, *known = drawn(case, seed=1, dtype=dtype)
    results = run_jax(operands, case, device, "composite", optimized=True)
    if dtype == "float64":
        assert_float64_equal(results, known[0], case)
    else:
        assert_within_rounding(results, operands, case, known)


@some_cases
@every_implementation
def test_float64_equals_the_oracle_under_a_dropout_mask(case: Case, name: str, run: Runner, device: Device) -> None:
    operands, truth, _ = drawn(case, seed=2, dropout=0.3)
    assert_float64_equal(run(operands, case, device, name), truth, case)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@some_cases
@every_implementation
def test_low_precision_errs_by_no_more_than_rounding(
    case: Case, name: str, run: Runner, dtype: str, device: Device
) -> None:
    operands, *known = drawn(case, seed=3, dtype=dtype)
    assert_within_rounding(run(operands, case, device, name), operands, case, known)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@every_implementation
def test_low_precision_errs_by_no_more_than_rounding_under_a_dropout_mask(
    name: str, run: Runner, dtype: str, device: Device
) -> None:
    case = CASES[0]
    operands, *known = drawn(case, seed=4, dtype=dtype, dropout=0.2)
    assert_within_rounding(run(operands, case, device, name), operands, case, known)


@every_implementation
def test_logits_in_float32_beside_a_bfloat16_value_are_not_rounded(name: str, run: Runner, device: Device) -> None:
    case = CASES[0]
    operands = draw(case, seed=5, dtype="bfloat16")
    logits = (8 * np.random.default_rng(5).standard_normal(case.logits_shape)).astype(np.float32)
    mixed = operands._replace(logits=logits)
    rounded = operands._replace(logits=logits.astype(DTYPES["bfloat16"]))

    truth, bound = attend(mixed, case.grid).out, 2 * 2**-7 * magnitudes(mixed, case.grid).out
    out = run(mixed, case, device, name).out
    assert out.dtype == DTYPES["bfloat16"]
    assert (np.abs(out.astype(np.float64) - truth) <= bound).all()
    assert not (np.abs(attend(rounded, case.grid).out - truth) <= bound).all()


@every_implementation
def test_an_empty_batch_gives_an_empty_output(name: str, run: Runner) -> None:
    case = Case("empty", 5, 4, 2, 3, B=0)
    results = run(draw(case, seed=6), case, CPU, name)
    assert [r.shape for r in results] == [case.value_shape, case.value_shape, case.logits_shape]


@every_implementation
def test_large_logits_do_not_overflow(name: str, run: Runner, device: Device) -> None:
    case = CASES[6]
    operands = draw(case, seed=7, dtype="float32")
    operands = operands._replace(logits=operands.logits * np.float32(1e4))
    results = run(operands, case, device, name)
    assert relative_error(results.out, attend(operands, case.grid).out) < 1e-5


PAIRS = {
    name: st.tuples(st.integers(low, high), st.integers(low, high))
    for name, low, high in (("map_size", 1, 7), ("kernel_size", 1, 5), ("stride", 1, 4), ("padding", 0, 4))
}


def fitted(
    map_size: tuple[int, int],
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    **sizes: int,
) -> Case:
    """Return the case as drawn if its windows fit, else with an odd kernel and "same" padding, which always fit."""
    try:
        window_grid(map_size, kernel_size, stride, padding)
    except ValueError:
        kernel_size = (kernel_size[0] | 1, kernel_size[1] | 1)
        padding = (kernel_size[0] // 2, kernel_size[1] // 2)
    return Case("drawn", *map_size, kernel_size=kernel_size, stride=stride, padding=padding, **sizes)


@every_implementation
@settings(max_examples=25)
@given(
    geometry=st.fixed_dictionaries(PAIRS),
    sizes=st.fixed_dictionaries({"B": st.integers(1, 3), "N": st.integers(1, 3), "D": st.integers(1, 4)}),
    seed=st.integers(0, 2**16),
    dropout=st.sampled_from([0.0, 0.5]),
)
def test_any_geometry_equals_the_oracle(
    name: str, run: Runner, geometry: dict[str, tuple[int, int]], sizes: dict[str, int], seed: int, dropout: float
) -> None:
    case = fitted(**geometry, **sizes)
    operands = draw(case, seed, dropout=dropout)
    truth, results = attend(operands, case.grid), run(operands, case, CPU, name)
    for result, exact in zip(results, truth, strict=True):
        # A drawn case may well have an all-zero result (every weight dropped, say): compare with the operands' scale.
        assert np.abs(result - exact).max() <= GRADIENT * max(1.0, np.abs(exact).max())


def test_the_oracle_itself_on_a_map_worked_by_hand() -> None:
    """Two pixels in a row, kernel 1x3, one channel: out[x] sums, over the windows on x, that window's row for x."""
    case = Case("by_hand", 1, 2, 1, 1, kernel_size=(1, 3), padding=(0, 1), B=1)
    value = np.array([3.0, 5.0]).reshape(case.value_shape)
    weights = np.array(
        [
            [[0.2, 0.3, 0.5], [0.1, 0.6, 0.3], [0.7, 0.2, 0.1]],  # window on pixel 0: places -1, 0, 1
            [[0.5, 0.25, 0.25], [0.4, 0.4, 0.2], [0.3, 0.3, 0.4]],  # window on pixel 1: places 0, 1, 2
        ]
    )
    # Window 0 sees (0, 3, 5), window 1 sees (3, 5, 0).
    first = (0.6 * 3 + 0.3 * 5) + (0.5 * 3 + 0.25 * 5)
    second = (0.2 * 3 + 0.1 * 5) + (0.4 * 3 + 0.4 * 5)
    operands = Operands(value, np.log(weights).reshape(case.logits_shape), np.ones(case.value_shape))
    np.testing.assert_allclose(attend(operands, case.grid).out.ravel(), [first, second], rtol=1e-14)
