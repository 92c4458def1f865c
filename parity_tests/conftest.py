"""Set-up of every test: shape checks, exact arithmetic, and the fixtures that several folders use."""

import gc
import os
from collections.abc import Iterator

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread each: what several workers start beside each other only spins
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import jaxtyping
import pytest

from parity_tests.support.type_checks import check_types

check_types()

from benchmarks.torchvision_stub import declare_missing_torchvision_operators  # noqa: E402
from outlook_parity.backends.jax.work import unoptimized  # noqa: E402
from parity_tests.support import arithmetic  # noqa: E402
from parity_tests.support.quick_process import save_time  # noqa: E402
from parity_tests.support.runners import Device, find_device  # noqa: E402

save_time()
arithmetic.make_exact()
declare_missing_torchvision_operators()
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "gpu", "tpu"), default="cpu", help="where the parity tests run")


def pytest_configure(config: pytest.Config) -> None:
    if config.pluginmanager.hasplugin("cacheprovider"):
        compilations = arithmetic.kept_compilations(config.cache.mkdir("xla"))
        compilations.__enter__()
        config.add_cleanup(lambda: compilations.__exit__(None, None, None))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # modules and tests stay too


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> Device:
    """The device under test; where it is absent, the tests that need it are reported as not run."""
    kind = request.config.getoption("--device")
    found = find_device(kind)
    if found is None:
        pytest.skip(f"not run: there is no {kind} here")
    return found


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """Compile this module's JAX programs without optimizations."""
    with unoptimized():
        yield


@pytest.fixture(autouse=True)
def _shape_checks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check shapes and types in every test but those marked `unchecked`."""
    unchecked = request.node.get_closest_marker("unchecked") is not None
    jaxtyping.config.update("jaxtyping_disable", unchecked)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
