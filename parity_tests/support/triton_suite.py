"""What `implementation="triton"` promises, on a GPU or under Triton's interpreter; `test_triton.py` runs it.

The interpreter takes seconds for what a GPU does in microseconds, hence the small cases.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

import outlook_torch
from outlook_common.op_cases import BY_NAME, CASES, Case
from outlook_torch.ops.triton import launch, operators
from parity_tests.op.test_op import assert_float64_equal, assert_within_rounding
from parity_tests.support.oracle import Operands, Results, attend, magnitudes, with_leading
from parity_tests.support.runners import DTYPES, Device, draw, relative_error, run_torch, to_torch

TINY = Case("tiny", 3, 4, 2, 3, kernel_size=(1, 3), stride=(1, 2), padding=(0, 1))
ODD_COLUMNS = Case("odd_columns", 2, 5, 2, 3, B=1)
FEW_PIXELS = Case("few_pixels", 4, 2, 1, 5, kernel_size=(2, 1), stride=(2, 1), padding=(0, 0), B=1)

FAST = ("stride_not_dividing", "gaps_between_windows", "rectangular_kernel_1_by_3", "one_channel")
every_case = pytest.mark.parametrize(
    "case",
    [
        # Minutes in the interpreter.
        pytest.param(case, id=case.name, marks=() if case.name in FAST else pytest.mark.slow)
        for case in CASES
    ],
)


@pytest.fixture(autouse=True)
def _quick_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes its time by the number of programs, and for what comes to nothing."""
    if launch.attend_kernel.__class__.__name__ != "InterpretedFunction":
        return
    for name, size in (("TILE", 2**16), ("THREADS", 2**8), ("LANES", 1), ("VECTOR_BYTES", 2**11)):
        monkeypatch.setattr(launch, name, size)
    # Sums of integers are computed twice, and what differs is reported in Triton's debug mode alone.
    options = interpreter.interpreter_builder.options
    assert not options.debug
    monkeypatch.setattr(interpreter.interpreter_builder, "options", replace(options, sanitize_overflow=False))
    # Triton's language is patched where a kernel starts, and would be again for each function of ours that it calls.
    called = interpreter.InterpretedFunction.__call__

    def call(function: Any, *arguments: Any, **named: Any) -> Any:
        if function.fn.__module__.startswith(launch.__package__):
            return function.rewrite()(*arguments, **named)
        return called(function, *arguments, **named)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)


def run(operands: Operands, case: Case, device: Device) -> Results:
    return run_torch(operands, case, device, "triton")


def tensors(case: Case, seed: int, device: Device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    operands = draw(case, seed)
    value, logits, cotangent = (to_torch(x, device) for x in operands[:3])
    return value.requires_grad_(), logits.requires_grad_(), cotangent


def op(case: Case, implementation: str = "triton") -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda value, logits: outlook_torch.outlook_attention(
        value, logits, **case.window, implementation=implementation
    )


@every_case
def test_float64_equals_the_oracle_forward_and_backward_under_a_dropout_mask(case: Case, device: Device) -> None:
    operands = draw(case, seed=1, dropout=0.3)
    assert_float64_equal(run(operands, case, device), attend(operands, case.grid), case)


def test_several_leading_axes_are_one_batch(device: Device) -> None:
    operands = draw(TINY, seed=1)
    found = run(with_leading(operands, (1, 2)), TINY, device)
    assert found.out.shape == (1, *TINY.value_shape)
    assert_float64_equal(Results(*(result[0] for result in found)), attend(operands, TINY.grid), TINY)


@pytest.fixture
def rolled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small windows run in the kernels for large ones."""
    monkeypatch.setattr(launch, "UNROLLED", 0)
    assert not launch.is_unrolled(TINY.grid)


def assert_equals_the_oracle(case: Case, seed: int, device: Device) -> None:
    operands = draw(case, seed, dropout=0.3)
    assert_float64_equal(run(operands, case, device), attend(operands, case.grid), case)


@pytest.mark.parametrize(
    ("case", "threads", "lanes", "vector_bytes"),
    [(FEW_PIXELS, 128, 8, 16), (FEW_PIXELS, 4, 2, 8), (ODD_COLUMNS, 64, 2, 8)],
    ids=lambda x: getattr(x, "name", None),
)
def test_tiles_of_any_size_give_the_same(
    case: Case, threads: int, lanes: int, vector_bytes: int, monkeypatch: pytest.MonkeyPatch, device: Device
) -> None:
    """The last of them with two cells beside each other, the last of which is beyond the map."""
    assert launch.is_unrolled(case.grid)
    for name, size in (("THREADS", threads), ("LANES", lanes), ("VECTOR_BYTES", vector_bytes)):
        monkeypatch.setattr(launch, name, size)
    assert_equals_the_oracle(case, 2, device)


@pytest.mark.usefixtures("rolled")
@pytest.mark.parametrize(("tile", "channels"), [(2**9, 128), (4, 2)])
def test_rolled_tiles_of_any_size_give_the_same(
    tile: int, channels: int, monkeypatch: pytest.MonkeyPatch, device: Device
) -> None:
    monkeypatch.setattr(launch, "TILE", tile)
    monkeypatch.setattr(launch, "CHANNELS", channels)
    assert_equals_the_oracle(FEW_PIXELS, 2, device)


def test_offsets_in_int64_give_the_same(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    monkeypatch.setattr(launch, "INT32_ELEMENTS", 0)
    assert_equals_the_oracle(TINY, 3, device)


@pytest.mark.usefixtures("rolled")
def test_rolled_offsets_in_int64_give_the_same(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    monkeypatch.setattr(launch, "INT32_ELEMENTS", 0)
    assert_equals_the_oracle(TINY, 3, device)


@pytest.mark.usefixtures("rolled")
def test_phases_with_fewer_windows_in_the_rolled_kernels(device: Device) -> None:
    assert_equals_the_oracle(BY_NAME["stride_not_dividing"], 17, device)


@pytest.mark.parametrize(
    ("dtype", "dropout"), [("float32", 0.0), ("bfloat16", 0.2), pytest.param("float16", 0.2, marks=pytest.mark.slow)]
)
def test_low_precision_errs_by_no_more_than_rounding(dtype: str, dropout: float, device: Device) -> None:
    case = Case("low_precision", 5, 6, 2, 8, stride=2)
    operands = draw(case, seed=4, dtype=dtype, dropout=dropout)
    assert_within_rounding(run(operands, case, device), operands, case)


def test_logits_in_float32_beside_a_bfloat16_value_are_not_rounded(device: Device) -> None:
    operands = draw(TINY, seed=5, dtype="bfloat16")
    logits = (8 * np.random.default_rng(5).standard_normal(TINY.logits_shape)).astype(np.float32)
    mixed = operands._replace(logits=logits)
    truth, bound = attend(mixed, TINY.grid).out, 2 * 2**-7 * magnitudes(mixed, TINY.grid).out
    results = run(mixed, TINY, device)
    assert (results.out.dtype, results.d_logits.dtype) == (DTYPES["bfloat16"], np.float32)
    assert (np.abs(results.out.astype(np.float64) - truth) <= bound).all()


def test_large_logits_do_not_overflow(device: Device) -> None:
    operands = draw(TINY, seed=6, dtype="float32")
    operands = operands._replace(logits=operands.logits * np.float32(1e4))
    assert relative_error(run(operands, TINY, device).out, attend(operands, TINY.grid).out) < 1e-5


def test_nothing_is_read_from_places_outside_the_map(device: Device) -> None:
    """Their logits take part in the softmax, but what is around the tensors does not."""
    operands = draw(TINY, seed=7)
    value, logits = (to_torch(x, device) for x in operands[:2])
    surrounded = [
        torch.full((x.shape[0] + 2, *x.shape[1:]), torch.nan, dtype=x.dtype, device=x.device) for x in (value, logits)
    ]
    for whole, part in zip(surrounded, (value, logits), strict=True):
        whole[1:-1] = part
    inner = [whole[1:-1].requires_grad_() for whole in surrounded]
    out = op(TINY)(*inner)
    grads = torch.autograd.grad(out, inner, to_torch(operands.cotangent, device))
    assert all(x.isfinite().all() for x in (out, *grads))


def test_tensors_that_are_not_contiguous_give_the_same(device: Device) -> None:
    value, logits, cotangent = tensors(TINY, 8, device)
    strided = [x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in (value, logits)]
    assert not any(x.is_contiguous() for x in strided)
    expanded = torch.ones((), dtype=cotangent.dtype, device=cotangent.device).expand_as(cotangent)
    out, strided_out = op(TINY)(value, logits), op(TINY)(*strided)
    assert torch.equal(out, strided_out)
    grads = torch.autograd.grad(out, (value, logits), torch.ones_like(cotangent))
    assert all(map(torch.equal, grads, torch.autograd.grad(strided_out, strided, expanded)))


def test_an_empty_batch_gives_an_empty_output(device: Device) -> None:
    case = Case("empty", 5, 4, 2, 3, B=0)
    results = run(draw(case, seed=9), case, device)
    assert [r.shape for r in results] == [case.value_shape, case.value_shape, case.logits_shape]


def test_two_runs_give_the_same_bits(device: Device) -> None:
    operands = draw(TINY, seed=10, dtype="float32", dropout=0.3)
    for first, second in zip(run(operands, TINY, device), run(operands, TINY, device), strict=True):
        assert first.tobytes() == second.tobytes()


def test_the_operators_are_what_torch_expects_of_an_operator(device: Device) -> None:
    value, logits, cotangent = (x.detach() for x in tensors(TINY, 11, device))
    mask = torch.ones_like(logits)
    sizes = [list(x) for x in (TINY.grid.kernel_size, TINY.grid.stride, TINY.grid.padding)]
    for name, operands in (("attend", (value, logits)), ("attend_backward", (cotangent, value, logits))):
        operator = getattr(torch.ops.outlook_attention, name).default
        assert set(torch.library.opcheck(operator, (*operands, mask, *sizes)).values()) == {"SUCCESS"}


def test_derivatives_of_first_and_second_order_in_both_modes(device: Device) -> None:
    value, logits, _ = tensors(FEW_PIXELS, 13, device)
    assert torch.autograd.gradcheck(op(FEW_PIXELS), (value, logits), check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(op(FEW_PIXELS), (value, logits), fast_mode=True)


def test_vmap_and_per_sample_gradients_equal_the_reference(device: Device) -> None:
    value, logits, _ = (x.detach() for x in tensors(TINY, 14, device))
    mask = torch.rand_like(logits)[:, None]
    for axes in ((0, 0), (0, None)):
        operands = value[:, None], logits[:, None] if axes[1] == 0 else logits[:1]

        def of(implementation: str) -> tuple[torch.Tensor, torch.Tensor]:
            def attend(v: torch.Tensor, a: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
                return outlook_torch.outlook_attention(
                    v, a, **TINY.window, dropout_mask=m, implementation=implementation
                )

            loss = lambda *args: attend(*args).square().sum()  # noqa: E731
            return tuple(
                torch.func.vmap(f, in_dims=(*axes, 0))(*operands, mask)  # noqa: B023
                for f in (attend, torch.func.grad(loss, argnums=1))
            )

        for result, expected in zip(of("triton"), of("reference"), strict=True):
            assert relative_error(result.cpu().numpy(), expected.cpu().numpy()) <= 1e-10


def test_nothing_but_the_operands_lives_across_the_forward(device: Device) -> None:
    value, logits, _ = tensors(TINY, 15, device)
    kept = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.add(x.data_ptr()) or x, lambda x: x):
        op(TINY)(value, logits)
    assert kept == {value.data_ptr(), logits.data_ptr()}


def test_the_gradient_runs_in_the_kernels(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    value, logits, cotangent = tensors(TINY, 16, device)
    out = op(TINY)(value, logits)
    calls: list[int] = []
    kernels = operators._attend_backward
    monkeypatch.setattr(operators, "_attend_backward", lambda *args: calls.append(1) or kernels(*args))
    torch.autograd.grad(out, (value, logits), cotangent)
    assert calls == [1]
