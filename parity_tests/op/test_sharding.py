"""The op in JAX where several devices share the operands: by `jax.shard_map`, and as XLA splits a program."""

from typing import Any

import pytest

from parity_tests.support import explicit_meshes
from parity_tests.support.jax_devices import DEVICES, SPECS
from parity_tests.support.subprocesses import run_on_devices


@pytest.fixture(scope="module")
def found() -> Any:
    return run_on_devices("parity_tests.support.jax_devices", DEVICES)


@pytest.fixture(scope="module")
def on_meshes() -> Any:
    return run_on_devices("parity_tests.support.explicit_meshes", 4)


@pytest.mark.parametrize("name", SPECS)
def test_shard_map_computes_what_one_device_does(found: Any, name: str) -> None:
    assert found["errors"][name] <= 1e-12


def test_operands_shared_by_heads_are_gathered_nowhere(found: Any) -> None:
    assert found["gathered"] == 0
    assert found["reduced"] >= 1  # the loss: the program is shared at all


@pytest.mark.parametrize("spec", explicit_meshes.SPECS)
@pytest.mark.parametrize("implementation", explicit_meshes.IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", explicit_meshes.KINDS)
def test_operands_on_a_mesh_of_either_kind_give_what_one_device_does(
    on_meshes: Any, kind: str, implementation: str, spec: str
) -> None:
    assert on_meshes["op"][f"{kind} {implementation} {spec}"] <= 1e-12


@pytest.mark.parametrize("implementation", explicit_meshes.IMPLEMENTATIONS)
def test_a_model_trains_on_images_whose_batch_is_explicitly_sharded(on_meshes: Any, implementation: str) -> None:
    assert on_meshes["model"][implementation] == "P('a', None), P('a', None, None), P(None, None)"


def test_tpus_get_kernels_except_where_xla_splits_the_program(found: Any) -> None:
    assert found["kernels"] == {"XLA": 0, "shard_map": 1, "one": 1}
