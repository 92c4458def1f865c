"""One `jax.export` for CPU, GPU and TPU at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

import outlook_jax
from outlook_common.op_cases import BY_NAME
from parity_tests.support.arithmetic import QUICKLY
from parity_tests.support.runners import draw, relative_error

PLATFORMS = ["cpu", "cuda", "tpu"]
CASE = BY_NAME["stride_not_dividing"]


def op(implementation: str) -> Callable[..., jax.Array]:
    return lambda value, logits: outlook_jax.outlook_attention(
        value, logits, **CASE.window, implementation=implementation
    )


def gradient(implementation: str) -> Callable[..., object]:
    return jax.grad(lambda *operands: (op(implementation)(*operands) ** 2).sum(), argnums=(0, 1))


def layer(implementation: str) -> Callable[..., object]:
    module = outlook_jax.OutlookAttention(
        CASE.dim, CASE.N, **CASE.window, deterministic=True, implementation=implementation, rngs=nnx.Rngs(0)
    )
    graph, parameters, rest = nnx.split(module, nnx.Param, ...)
    parameters = nnx.to_pure_dict(parameters)

    def run(value: jax.Array, _: jax.Array) -> object:
        x = value.reshape(*value.shape[:3], -1).astype(jnp.float32)
        return jax.value_and_grad(lambda p: (nnx.merge(graph, p, rest)(x) ** 2).sum())(parameters)

    return run


@pytest.mark.unchecked  # of shapes that jit caches
@pytest.mark.parametrize("implementation", ["composite", "reference"])
@pytest.mark.parametrize("make", [op, gradient, layer], ids=lambda make: make.__name__)
def test_an_export_for_all_platforms_gives_the_same_numbers_on_a_cpu(
    make: Callable[[str], Callable[..., object]], implementation: str
) -> None:
    value, logits, *_ = draw(CASE, seed=1)
    exported = export.export(jax.jit(make(implementation)), platforms=PLATFORMS)(value, logits)
    assert exported.platforms == tuple(PLATFORMS)
    expected, found = (
        jax.tree.leaves(jax.jit(f, compiler_options=QUICKLY)(jnp.asarray(value), jnp.asarray(logits)))
        for f in (make(implementation), exported.call)
    )
    for theirs, ours in zip(expected, found, strict=True):
        bound = 1e-6 if ours.dtype == np.float32 else 1e-14
        assert relative_error(np.asarray(ours), np.asarray(theirs)) <= bound


@pytest.mark.unchecked
def test_a_gpu_gets_composite_as_gathers_and_no_scatter() -> None:
    value, logits, *_ = draw(CASE, seed=1)
    for make in (op, gradient):
        programs = {
            platform: export.export(jax.jit(make("composite")), platforms=[platform])(value, logits).mlir_module()
            for platform in PLATFORMS
        }
        assert "stablehlo.gather" in programs["cuda"]
        assert "stablehlo.scatter" not in programs["cuda"]
        assert not any("stablehlo.gather" in programs[platform] for platform in ("cpu", "tpu"))


@pytest.mark.unchecked
def test_the_reference_scatters_nothing() -> None:
    value, logits, *_ = draw(CASE, seed=1)
    for make in (op, gradient):
        program = export.export(jax.jit(make("reference")), platforms=["cuda"])(value, logits).mlir_module()
        assert "stablehlo.scatter" not in program
