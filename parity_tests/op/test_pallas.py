"""The Pallas kernels, interpreted on the CPU, and lowered for a TPU that is not there."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from outlook_common.op_cases import Case
from outlook_jax import outlook_attention
from outlook_jax.ops.pallas import batch_launch, interpreted, launch
from parity_tests.op.test_op import assert_float64_equal, assert_within_rounding
from parity_tests.support.arithmetic import QUICKLY
from parity_tests.support.oracle import Results, attend, with_leading
from parity_tests.support.runners import draw, relative_error, run_jax

ROWS = Case("rows", 9, 3, 2, 3, kernel_size=(3, 1), stride=(2, 1), padding=(1, 0))
COLUMNS = Case("columns", 2, 5, 1, 8, kernel_size=(1, 3), stride=(1, 2), padding=(0, 1))
UNEVEN = Case("uneven_padding", 4, 3, 1, 2, kernel_size=(2, 1), stride=(3, 2), padding=(1, 0))
IMAGES = ROWS.with_batch(128)  # which fill the lanes

run = partial(run_jax, implementation="pallas")


@pytest.fixture
def interpreter() -> Iterator[None]:
    with interpreted():
        yield


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the kernels cut these small maps into several blocks of rows, as they do large ones."""
    monkeypatch.setattr(launch, "LANES_AT_ONCE", 24)
    monkeypatch.setattr(batch_launch, "VMEM", 2**21)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("case", [ROWS, COLUMNS], ids=lambda case: case.name)
def test_float64_equals_the_oracle_forward_and_backward(case: Case) -> None:
    operands = draw(case, seed=1)
    assert launch.cells_of(case.grid, operands.value, operands.logits, None).blocks == 1
    assert_float64_equal(run(operands, case), attend(operands, case.grid), case)


@pytest.mark.usefixtures("interpreter")
def test_several_leading_axes_are_one_batch() -> None:
    operands = draw(COLUMNS, seed=1)
    found = run(with_leading(operands, (1, 2)), COLUMNS)
    assert found.out.shape == (1, *COLUMNS.value_shape)
    assert_float64_equal(Results(*(result[0] for result in found)), attend(operands, COLUMNS.grid), COLUMNS)


@pytest.mark.usefixtures("interpreter", "small_blocks")
def test_blocks_of_rows_take_what_they_need_of_those_beside_them() -> None:
    operands = draw(ROWS, seed=2)
    assert launch.cells_of(ROWS.grid, operands.value, operands.logits, None).blocks >= 3
    assert_float64_equal(run(operands, ROWS), attend(operands, ROWS.grid), ROWS)


@pytest.mark.usefixtures("interpreter", "small_blocks")
def test_images_that_fill_the_lanes_give_the_same_under_a_dropout_mask() -> None:
    operands = draw(IMAGES, seed=3, dropout=0.3)
    shapes = operands.value, operands.logits, (operands.dropout_mask,)
    assert batch_launch.fits(IMAGES.grid, *shapes)
    assert batch_launch.blocks_for(IMAGES.grid, *shapes, gram=False).rows < 5
    assert_float64_equal(run(operands, IMAGES), attend(operands, IMAGES.grid), IMAGES)


@pytest.mark.usefixtures("interpreter")
def test_rows_and_columns_at_once_under_a_dropout_mask() -> None:
    case = Case("square", 3, 5, 1, 8, kernel_size=2, stride=2, padding=1, B=1)
    operands = draw(case, seed=4, dropout=0.3)
    assert_float64_equal(run(operands, case), attend(operands, case.grid), case)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("case", [COLUMNS, UNEVEN.with_batch(128)], ids=["cells", "images"])
def test_bfloat16_errs_by_no_more_than_rounding(case: Case) -> None:
    operands = draw(case, seed=5, dtype="bfloat16")
    assert_within_rounding(run(operands, case), operands, case)


@pytest.mark.usefixtures("interpreter")
def test_minus_infinity_in_the_logits_is_a_weight_of_zero() -> None:
    operands = draw(UNEVEN, seed=6)
    operands.logits[..., 1] = -np.inf
    out = jit(_ops(UNEVEN)[0])(operands.value, operands.logits)
    assert relative_error(np.asarray(out), attend(operands, UNEVEN.grid).out) <= 1e-12


# Optimised, what is interpreted compiles for longer than it runs.
jit = partial(jax.jit, compiler_options=QUICKLY)


def _ops(case: Case) -> list[Any]:
    names = "pallas", "reference"
    return [partial(outlook_attention, **case.window, implementation=name) for name in names]


@pytest.mark.usefixtures("interpreter")
def test_forward_mode_and_second_derivatives() -> None:
    value, logits, direction, _ = map(jnp.asarray, draw(UNEVEN, seed=7, dropout=0.5))

    def along(op: Any) -> Any:
        def loss(v: jax.Array, a: jax.Array) -> jax.Array:
            return jnp.sin(op(v, a)).sum()

        tangents = direction, jnp.cos(logits)
        return jit(lambda: jax.jvp(jax.grad(loss, (0, 1)), (value, logits), tangents))()

    ours, theirs = (jax.tree.leaves(along(op)) for op in _ops(UNEVEN))
    assert len(ours) == 4
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(np.asarray(a), np.asarray(b)) <= 1e-10


@pytest.mark.usefixtures("interpreter")
def test_vmap_equals_a_loop() -> None:
    value = jnp.asarray(np.stack([draw(COLUMNS, seed=seed).value for seed in range(3)], 1))
    logits = jnp.asarray(draw(COLUMNS, seed=3).logits)
    theirs = jit(_ops(COLUMNS)[1])
    out = jit(jax.vmap(_ops(COLUMNS)[0], in_axes=(1, None)))(value, logits)
    expected = np.stack([theirs(value[:, i], logits) for i in range(3)])
    assert relative_error(np.asarray(out), expected) <= 1e-12


@pytest.mark.usefixtures("interpreter")
def test_shard_map_takes_the_kernels_and_their_gradients() -> None:
    value, logits = (jnp.asarray(x) for x in draw(UNEVEN.with_batch(1), seed=8)[:2])
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))

    def gradients(op: Any) -> Any:
        def loss(v: jax.Array, a: jax.Array) -> jax.Array:
            share = lambda *x: jax.lax.psum(jnp.sin(op(*x)).sum(), "x")  # noqa: E731
            specs = PartitionSpec("x"), PartitionSpec()
            return jax.shard_map(share, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())(v, a)

        return jit(jax.grad(loss, (0, 1)))(value, logits)

    for a, b in zip(*map(gradients, _ops(UNEVEN)), strict=True):
        assert relative_error(np.asarray(a), np.asarray(b)) <= 1e-10


@pytest.mark.parametrize("batch", [2, 128])
def test_gradients_are_lowered_for_a_tpu_where_there_is_none(batch: int) -> None:
    value, logits = (jnp.zeros(s, jnp.bfloat16) for s in (ROWS.with_batch(batch).value_shape, _logits_shape(batch)))
    op = partial(outlook_attention, **ROWS.window, implementation="pallas")
    program = jax.export.export(jax.jit(jax.grad(lambda *x: op(*x).sum(), (0, 1))), platforms=["tpu"])(value, logits)
    assert program.mlir_module().count("tpu_custom_call") == 2  # the transposed kernel, and that of the logits
    with pytest.raises(NotImplementedError, match="it is for TPUs, and this was lowered for cpu"):
        jax.jit(op)(value, logits)


def test_of_several_names_the_next_is_taken_where_there_is_no_tpu() -> None:
    value, logits = (jnp.asarray(x, jnp.float32) for x in draw(UNEVEN, seed=9)[:2])
    op = partial(outlook_attention, value, logits, **UNEVEN.window)
    np.testing.assert_array_equal(op(implementation=("pallas", "reference")), op(implementation="reference"))


def _logits_shape(batch: int) -> tuple[int, ...]:
    return ROWS.with_batch(batch).logits_shape


@pytest.mark.unchecked  # of shapes alone
@pytest.mark.parametrize(
    ("case", "dtype", "message"),
    [
        (ROWS, "float64", "value is float64, which TPUs do not compute in; bfloat16 and float32 they do"),
        (ROWS, "float16", "value is float16"),
        (Case("wide", 8, 8, 1, 2, kernel_size=7, padding=3), "float32", "49 places; more than 25"),
        (Case("long", 5, 40_000, 1, 256), "float32", r"one row of windows needs \d+ bytes of VMEM, more than \d+"),
    ],
    ids=["float64", "float16", "kernel_7", "memory"],
)
def test_what_the_kernels_do_not_take_is_refused_with_numbers(case: Case, dtype: str, message: str) -> None:
    operands = (jax.ShapeDtypeStruct(shape, dtype) for shape in (case.value_shape, case.logits_shape))
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(partial(outlook_attention, **case.window, implementation="pallas"), *operands)
