"""What `implementation=None` takes in JAX, by the platform that a program is lowered for."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from outlook_common.op_cases import BY_NAME, Case
from outlook_jax import outlook_attention
from outlook_jax.ops import choice
from outlook_jax.ops.pallas import launch
from parity_tests.support.arithmetic import QUICKLY
from parity_tests.support.runners import draw, relative_error

CASE = Case("chosen", 12, 7, 2, 32, stride=2)  # large enough for composite
SMALL = BY_NAME["one_row"]
WIDE = Case("wide", 9, 9, 4, 8, kernel_size=7, padding=3)  # more places than the kernels unroll
PLATFORMS = ("cpu", "cuda", "tpu")
KERNEL, GATHER = "tpu_custom_call", "stablehlo.gather"

Op = Callable[..., jax.Array]


def op(case: Case, implementation: str | None = None) -> Op:
    return partial(outlook_attention, **case.window, implementation=implementation)


def gradients(case: Case, implementation: str | None = None) -> Callable[..., object]:
    return jax.grad(lambda *operands: jnp.sin(op(case, implementation)(*operands)).sum(), argnums=(0, 1))


def exported(run: Callable[..., object], case: Case, *platforms: str, dtype: str = "float32") -> str:
    shapes = (jax.ShapeDtypeStruct(shape, dtype) for shape in (case.value_shape, case.logits_shape))
    program = jax.export.export(jax.jit(run), platforms=platforms)(*shapes).mlir_module()
    return "".join(line for line in program.splitlines(keepends=True) if not line.startswith("#loc"))


@pytest.mark.unchecked  # of shapes that `jax.export` caches
@pytest.mark.parametrize(("make", "kernels"), [(op, 1), (gradients, 3)])
def test_each_platform_gets_what_is_fastest_there(make: Callable[[Case], Op], kernels: int) -> None:
    found = {platform: exported(make(CASE), CASE, platform) for platform in PLATFORMS}
    assert [found[platform].count(KERNEL) for platform in PLATFORMS] == [0, 0, kernels]
    assert [GATHER in found[platform] for platform in PLATFORMS] == [False, True, False]


@pytest.mark.unchecked
def test_one_export_for_all_platforms_has_a_branch_for_each() -> None:
    program = exported(op(CASE), CASE, *PLATFORMS)
    assert program.count(KERNEL) == 1
    assert GATHER in program


@pytest.mark.unchecked
def test_an_export_for_all_platforms_gives_composites_numbers_on_a_cpu() -> None:
    operands = [jnp.asarray(x, jnp.float32) for x in draw(CASE, seed=1)[:2]]
    program = jax.export.export(jax.jit(gradients(CASE)), platforms=PLATFORMS)(*operands)
    for ours, theirs in zip(program.call(*operands), jax.jit(gradients(CASE, "composite"))(*operands), strict=True):
        assert relative_error(np.asarray(ours), np.asarray(theirs)) <= 1e-6


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("case", "dtype"), [(CASE, "float16"), (WIDE, "float32")], ids=["no dtype of a TPU", "too many places"]
)
def test_a_tpu_gets_composite_where_the_kernels_cannot_run(case: Case, dtype: str) -> None:
    program = exported(op(case), case, "tpu", dtype=dtype)
    assert KERNEL not in program
    assert program == exported(op(case, "composite"), case, "tpu", dtype=dtype)


@pytest.mark.unchecked
@pytest.mark.parametrize(("make", "kernels"), [(op, 1), (gradients, 3)])
def test_small_maps_get_the_reference_off_a_tpu(make: Callable[[Case], Op], kernels: int) -> None:
    found = {platform: exported(make(SMALL), SMALL, platform) for platform in PLATFORMS}
    assert [found[platform].count(KERNEL) for platform in PLATFORMS] == [0, 0, kernels]
    assert ["stablehlo.convolution" in found[platform] for platform in PLATFORMS] == [True, True, False]


def test_no_kernel_is_traced_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a kernel was traced")

    for name in ("mix", "gram"):
        monkeypatch.setattr(launch, name, forbidden)
    operands = [jnp.asarray(x, jnp.float32) for x in draw(CASE, seed=2)[:2]]
    jax.jit(gradients(CASE)).lower(*operands)
    with pytest.raises(AssertionError, match="a kernel was traced"):
        exported(gradients(CASE), CASE, "tpu")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(("case", "elsewhere"), [(CASE, "composite"), (SMALL, "reference")])
def test_numbers_and_derivatives_are_those_of_what_runs_off_a_tpu(case: Case, elsewhere: str, dropout: float) -> None:
    """Float32, in which the choice is made by the platform: no kernel takes float64."""
    value, logits, direction, mask = (
        None if x is None else jnp.asarray(x, jnp.float32) for x in draw(case, seed=3, dropout=dropout)
    )
    mapped = jnp.stack([value, direction], axis=1)

    def everything(implementation: str | None) -> object:
        run = partial(op(case, implementation), dropout_mask=mask)
        loss = lambda v, a: jnp.sin(run(v, a)).sum()  # noqa: E731
        along = jax.jvp(jax.grad(loss, (0, 1)), (value, logits), (direction, jnp.cos(logits)))
        return run(value, logits), along, jax.vmap(run, in_axes=(1, None))(mapped, logits)

    run = partial(jax.jit, compiler_options=QUICKLY)
    ours, theirs = (jax.tree.leaves(run(partial(everything, name))()) for name in (None, elsewhere))
    assert len(ours) == 6
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(np.asarray(a), np.asarray(b)) <= 2e-6


@pytest.mark.unchecked
def test_the_choice_is_made_for_what_both_can_run() -> None:
    def chosen(case: Case, dtype: str) -> Callable[..., object]:
        operands = (jax.ShapeDtypeStruct(shape, dtype) for shape in (case.value_shape, case.logits_shape))
        return choice.choose_by_platform(*operands, None, case.grid)

    table = choice.IMPLEMENTATIONS
    for case in (BY_NAME["volo_d1"], BY_NAME["seed_512"], CASE):
        assert chosen(case, "float32") is chosen(case, "bfloat16") is choice.pallas_or_composite
        assert chosen(case, "float64") is table["composite"].run
    assert chosen(SMALL, "float32") is choice.pallas_or_reference
    assert chosen(SMALL, "float64") is table["reference"].run
