"""Composite's formulations for GPUs, called directly on the CPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from outlook_common.op_cases import BY_NAME, CASES, Case
from outlook_jax.ops.composite import gather, softmax
from outlook_jax.ops.composite.map_last import map_last
from outlook_jax.ops.reference import at_least_float32
from parity_tests.op.test_op import assert_float64_equal, assert_within_rounding, some_cases
from parity_tests.support.oracle import Operands, Results, attend
from parity_tests.support.runners import DTYPES, draw

every_case = pytest.mark.parametrize(
    "case",
    [*CASES, Case("nothing_meets", 1, 1, 1, 2, kernel_size=1, stride=3, padding=1, B=1)],
    ids=lambda case: case.name,
)

# By default XLA's CPU compiler (jaxlib 0.10.2) hands what is lowered on GPUs alone to YNNPACK, which crashes on it.
BY_XLA_ITSELF = {"xla_cpu_experimental_ynn_fusion_type": ""}


def run(operands: Operands, case: Case) -> Results:
    """Return what composite and its derivative rules compute, by the formulations for GPUs."""

    @partial(jax.jit, compiler_options=BY_XLA_ITSELF)
    def op(value: jax.Array, logits: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, ...]:
        wide = map_last(logits).astype(at_least_float32(logits))
        probabilities = softmax._softmax_by_element(wide)
        dropped = probabilities if mask is None else probabilities * map_last(mask)
        weights = dropped.astype(value.dtype)
        out = gather.weighted_sum(weights, value, case.grid)
        d_value = gather.weighted_sum(weights.swapaxes(2, 3), cotangent, case.grid)
        d_weights = gather.products_per_window(cotangent, value, case.grid).astype(wide.dtype)
        d_weights = d_weights if mask is None else d_weights * map_last(mask)
        d_logits = softmax._softmax_tangent_by_element(probabilities, d_weights)
        return out, d_value, d_logits.transpose(0, 4, 5, 1, 2, 3).astype(logits.dtype)

    mask = None if operands.dropout_mask is None else jnp.asarray(operands.dropout_mask)
    return Results(*map(np.asarray, op(*map(jnp.asarray, operands[:3]))))


@every_case
def test_float64_equals_the_oracle_forward_and_backward(case: Case) -> None:
    operands = draw(case, seed=1)
    truth = attend(operands, case.grid)
    if truth.out.any():
        assert_float64_equal(run(operands, case), truth, case)
    else:
        assert all((result == 0).all() for result in run(operands, case))


@some_cases
def test_float64_equals_the_oracle_under_a_dropout_mask(case: Case) -> None:
    operands = draw(case, seed=2, dropout=0.3)
    assert_float64_equal(run(operands, case), attend(operands, case.grid), case)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@some_cases
def test_low_precision_errs_by_no_more_than_rounding(case: Case, dtype: str) -> None:
    operands = draw(case, seed=3, dtype=dtype)
    assert_within_rounding(run(operands, case), operands, case)


def test_an_empty_batch_gives_an_empty_output() -> None:
    case = Case("empty", 5, 4, 2, 3, B=0)
    assert [r.shape for r in run(draw(case, seed=6), case)] == [case.value_shape, case.value_shape, case.logits_shape]


def test_what_is_infinite_stays_in_its_windows() -> None:
    case = BY_NAME["stride_not_dividing"]
    operands = draw(case, seed=4)
    operands.value[0, 0, 0] = np.inf
    windows = [window for window in range(case.grid.grid[0]) if 2 * window - 1 <= 0]
    beyond = max(windows) * 2 - 1 + 3
    out = run(operands, case).out
    assert not np.isfinite(out[0, 0, 0]).any()
    assert np.isfinite(out[0, beyond:]).all()
    assert np.isfinite(out[0, :, beyond:]).all()
    assert np.isfinite(out[1:]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_any_size_have_the_softmax_of_jax(dtype: str) -> None:
    logits = np.random.default_rng(7).standard_normal((2, 3, 9, 9, 2, 2)).astype(DTYPES[dtype])
    logits[0] *= 1e4
    logits[1, 1, :, 2:5] = -np.inf
    wide = jnp.asarray(logits).astype(jnp.promote_types(dtype, "float32"))
    expected = np.asarray(jax.nn.softmax(wide, axis=3))
    found = np.asarray(softmax._softmax_by_element(wide))
    np.testing.assert_allclose(found, expected, rtol=32 * np.finfo(wide.dtype).eps, atol=1e-37)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_not_hidden(bad: float) -> None:
    logits = np.zeros((1, 1, 9, 9, 1, 1))
    logits[..., 4, :, :] = bad
    assert np.isnan(softmax._softmax_by_element(jnp.asarray(logits))).any()
    assert not np.isfinite(softmax._softmax_by_element(jnp.full((1, 1, 9, 9, 1, 1), -np.inf))).any()


@pytest.mark.long(reason="compiles derivatives of derivatives")
def test_the_softmax_has_derivatives_of_any_order_in_both_modes() -> None:
    logits = jnp.asarray(np.random.default_rng(8).standard_normal((1, 2, 4, 4, 1, 2)))
    for order in range(1, 4):

        def derivative(function, x: jax.Array, order: int = order) -> jax.Array:  # type: ignore[no-untyped-def]
            along = lambda t: function(x * (1 + t * jnp.cos(x))).sum(axis=2)  # noqa: E731
            for _ in range(order - 1):
                along = jax.jacfwd(along)
            return jax.jacrev(along)(0.1)

        found, expected = (derivative(f, logits) for f in (softmax.softmax, partial(jax.nn.softmax, axis=3)))
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)
