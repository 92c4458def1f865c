"""The op in JAX where several devices share the operands: by `jax.shard_map`, and as XLA splits a program."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from parity_tests.support.jax_devices import DEVICES, SPECS


@pytest.fixture(scope="module")
def found() -> Any:
    flags = f"--xla_force_host_platform_device_count={DEVICES} --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, "-m", "parity_tests.support.jax_devices"],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", SPECS)
def test_shard_map_computes_what_one_device_does(found: Any, name: str) -> None:
    assert found["errors"][name] <= 1e-12


def test_operands_shared_by_heads_are_gathered_nowhere(found: Any) -> None:
    assert found["gathered"] == 0
    assert found["reduced"] >= 1  # the loss: the program is shared at all


def test_tpus_get_kernels_except_where_xla_splits_the_program(found: Any) -> None:
    assert found["kernels"] == {"XLA": 0, "shard_map": 1, "one": 1}
