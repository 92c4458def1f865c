"""The op, compiled for a TPU and a GPU that are not there; `make accelerators` has the compilers."""

from typing import Any

import numpy as np
import pytest

from outlook_common.config import volo_config
from outlook_common.op_cases import Case

# JAX is imported within the tests, after what `benchmarks.accelerators` puts into the environment.
pytestmark = pytest.mark.unchecked  # of shapes alone

CASE = Case("compiled", 14, 14, 2, 32, stride=2)  # large enough for what large maps get
SHARED = Case("shared", 8, 8, 4, 32, B=16)

both_directions = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])


@both_directions
@pytest.mark.parametrize("chips", ["v5e:2x2", "v6e:2x2"])
def test_none_gets_mosaics_kernels_on_a_tpu_and_is_not_slower_than_the_reference(chips: str, backward: bool) -> None:
    pytest.importorskip("libtpu")
    from benchmarks.accelerators import cases, tpu

    ours, theirs = (
        tpu.compile_for(cases.op(CASE, "bfloat16", name, backward=backward), chips) for name in (None, "reference")
    )
    assert (ours["Pallas kernels"], theirs["Pallas kernels"]) == (1 + backward, 0)
    assert 0 < ours["of them in Pallas"] < ours["kcycles"] <= theirs["kcycles"]


def test_bundles_in_loops_count_as_often_as_the_loops_run() -> None:
    from benchmarks.accelerators import llo

    text = """
= control target key start
LB: loop body
     0   :  { %s1_s0 = smov 0 }
   0x1 LB: > { %s2_s1 = sadd.s32 1, %s1_s0  ;;  %v1 = vld [vmem:[%s0]] } /* Start region 9 :: Start region 1 */
   0x2   :  {} /* End region 4 */
   0x3 LB: >> { %p1 = scmp.ge.s32.totalorder %s3_s2, 7 /* loop exit test */ } /* Start region 2 */
   0x4   : >> { %1 = sbr.rel (!%p1) target = $region2 }
   0x5 LB: >> { %p2 = scmp.ge.s32.totalorder (%p1), %s4_s3, 1 } /* Start region 3 */
   0x6   : > { %2 = sbr.rel (!%p2) target = $region3 }
   0x7 PF: > { %p3 = scmp.ge.s32.totalorder %s2_s1, 10 /* loop exit test */ }
   0x8   :  { %3 = sbr.rel (!%p3) target = $region1 }
"""
    assert llo.cycles(text) == 2 + 10 * (2 + 2 * 7 + 1 + 2)
    with pytest.raises(ValueError, match="a loop of unknown length begins with '0x3 LB: >> "):
        llo.cycles(text.replace("%s3_s2, 7", "%s3_s2, %s9_s9"))


@both_directions
def test_xla_compiles_the_default_op_for_an_h100_without_atomics_and_spills(backward: bool) -> None:
    pytest.importorskip("jax_cuda12_plugin")
    from benchmarks.accelerators import cases, gpu

    figures, reference = (
        gpu.compile_for(cases.op(CASE, "float32", name, backward=backward)) for name in (None, "reference")
    )
    assert figures["atomics"] == figures["spilled bytes"] == 0
    assert 0 < figures["kernels"] <= 6
    assert figures["kernels"] <= reference["kernels"]
    assert figures["bytes / floor"] <= reference["bytes / floor"]


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
@pytest.mark.parametrize("implementation", [None, "composite"])
def test_sixteen_chips_exchange_nothing(
    implementation: str | None, axes: tuple[str | tuple[str, ...] | None, ...], backward: bool
) -> None:
    pytest.importorskip("libtpu")
    from benchmarks.accelerators import cases, tpu

    assert tpu.collectives_when_shared(cases.op(SHARED, "bfloat16", implementation, backward=backward), axes) == []


def test_what_is_exchanged_is_seen() -> None:
    pytest.importorskip("libtpu")
    from benchmarks.accelerators import cases, tpu

    assert tpu.collectives_when_shared(cases.op(SHARED, "bfloat16", "composite"), (None, "data")) != []


def test_adamw_moves_stacked_parameters_as_it_moves_them_one_by_one() -> None:
    from benchmarks.accelerators import step

    jax, optax, nnx = step.jax, step.optax, step.nnx
    sizes = {"stem_hidden_dim": 4, "embed_dims": (8, 16, 16, 16), "num_heads": (2, 4, 4, 4)}
    config = volo_config("volo_d1_224", layers=(2, 3, 1, 1), img_size=32, num_classes=3, **sizes)
    shapes = nnx.state(nnx.eval_shape(lambda: step.outlook_jax.VOLO(config, rngs=nnx.Rngs(0))), nnx.Param)
    random = np.random.default_rng(0)
    parameters = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32), shapes)
    stack, unstack = step.stacked(parameters)
    adamw = optax.adamw(1e-2, weight_decay=0.05)

    @jax.jit
    def moved(parameters: Any) -> Any:
        moments = adamw.init(parameters)
        for _ in range(2):
            gradients = jax.tree.map(jax.numpy.sin, parameters)
            updates, moments = adamw.update(gradients, moments, parameters)
            parameters = optax.apply_updates(parameters, updates)
        return parameters

    assert len(stack(parameters)) < len(jax.tree.leaves(parameters)) * 2 / 3
    jax.tree.map(np.testing.assert_array_equal, unstack(moved(stack(parameters))), moved(parameters))
