"""A sharded training goes on in the other framework, sharded otherwise: the next losses are its own."""

from pathlib import Path

import numpy as np
import pytest

from parity_tests.support.across_frameworks import DEVICES, RANKS, STEPS
from parity_tests.support.subprocesses import run_in_processes, run_on_devices

MODULE = "parity_tests.support.across_frameworks"


@pytest.mark.slow(reason="five processes, two compile a training step for eight devices")
def test_fsdp2_saved_by_dcp_goes_on_in_sharded_jax_and_from_its_orbax_folder_back(tmp_path: Path) -> None:
    in_torch, same = run_in_processes(MODULE, RANKS, RANKS, "torch begins", tmp_path)
    in_jax = run_on_devices(MODULE, DEVICES, "jax goes on", "0", "1", "0", str(tmp_path))
    back, _ = run_in_processes(MODULE, RANKS, RANKS, "torch goes on", tmp_path)
    assert in_torch == same
    np.testing.assert_allclose(in_jax[:STEPS], in_torch, rtol=1e-12)
    np.testing.assert_allclose(back, in_jax[STEPS:], rtol=1e-12)
    assert len({round(loss, 6) for loss in in_jax}) == 2 * STEPS
