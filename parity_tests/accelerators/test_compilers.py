"""The op, compiled for a TPU and a GPU that are not there; `make accelerators` has the compilers."""

import pytest

from outlook_common.op_cases import Case

# JAX is imported within the tests, after what `benchmarks.accelerators` puts into the environment.
pytestmark = pytest.mark.unchecked  # of shapes alone

CASE = Case("compiled", 14, 14, 2, 32, stride=2)  # large enough for what large maps get
SHARED = Case("shared", 8, 8, 4, 32, B=16)

both_directions = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])


@both_directions
def test_mosaic_compiles_the_kernels_for_a_v5e(backward: bool) -> None:
    pytest.importorskip("libtpu")
    from benchmarks.accelerators import cases, tpu

    figures = tpu.compile_for(cases.op(CASE, "bfloat16", "pallas", backward=backward))
    assert figures["Pallas kernels"] == 1 + backward


@both_directions
def test_xla_compiles_the_default_op_for_an_h100_without_atomics_and_spills(backward: bool) -> None:
    pytest.importorskip("jax_cuda12_plugin")
    from benchmarks.accelerators import cases, gpu

    figures = gpu.compile_for(cases.op(CASE, "float32", None, backward=backward))
    assert figures["atomics"] == figures["spilled bytes"] == 0
    assert 0 < figures["kernels"] <= 6


def test_atomics_are_seen() -> None:
    pytest.importorskip("jax_cuda12_plugin")
    from benchmarks.accelerators import cases, gpu

    jax = cases.jax
    operands = jax.ShapeDtypeStruct((64,), "float32"), jax.ShapeDtypeStruct((64,), "int32")
    scatter = cases.Program("scatter", lambda x, to: (0 * x).at[to].add(x), operands, floor=1)
    assert gpu.compile_for(scatter)["atomics"] > 0


@both_directions
@pytest.mark.parametrize(
    "axes", [(("data", "heads"),), ("data", None, None, "heads")], ids=["batch", "batch and heads"]
)
def test_sixteen_chips_exchange_nothing(axes: tuple[str | tuple[str, ...] | None, ...], backward: bool) -> None:
    pytest.importorskip("libtpu")
    from benchmarks.accelerators import cases, tpu

    assert tpu.collectives_when_shared(cases.op(SHARED, "bfloat16", "composite", backward=backward), axes) == []


def test_what_is_exchanged_is_seen() -> None:
    pytest.importorskip("libtpu")
    from benchmarks.accelerators import cases, tpu

    assert tpu.collectives_when_shared(cases.op(SHARED, "bfloat16", "composite"), (None, "data")) != []
