"""Set-up of the whole run: exact arithmetic, the device, and the oracle's missing operators."""

import os
from collections.abc import Iterator

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread each: what several workers start beside each other only spins
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import jax
import jaxtyping
import pytest
import torch

# Shapes and types stand in the signatures: check them at every call, which takes a hook before the first import.
jaxtyping.install_import_hook(
    ["outlook_common", "outlook_torch", "outlook_jax", "outlook_parity"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

from parity_tests.support.runners import Device, find_device  # noqa: E402
from parity_tests.support.torchvision_stub import declare_missing_torchvision_operators  # noqa: E402

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_default_matmul_precision", "highest")
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("repeatable")


declare_missing_torchvision_operators()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "gpu", "tpu"), default="cpu", help="where the parity tests run")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> Device:
    """The device under test; where it is absent, the tests that need it are reported as not run."""
    kind = request.config.getoption("--device")
    found = find_device(kind)
    if found is None:
        pytest.skip(f"not run: there is no {kind} here")
    return found


@pytest.fixture(autouse=True)
def _shape_checks(request: pytest.FixtureRequest) -> Iterator[None]:
    unchecked = request.node.get_closest_marker("unchecked") is not None
    jaxtyping.config.update("jaxtyping_disable", unchecked)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
