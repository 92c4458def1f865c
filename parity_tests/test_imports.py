"""Which package imports what, and what is said when a framework is missing."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

PACKAGES = ("outlook_common", "outlook_torch", "outlook_jax", "outlook_parity")


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("outlook_common", {"torch", "jax", "flax", "outlook_torch", "outlook_jax", "outlook_parity"}),
        ("outlook_torch", {"jax", "flax", "outlook_jax", "outlook_parity"}),
        ("outlook_jax", {"torch", "outlook_torch", "outlook_parity"}),
        ("outlook_parity.cli.app", {"torch", "jax", "flax", "outlook_torch", "outlook_jax", "matplotlib", "sklearn"}),
    ],
)
def test_a_package_imports_only_what_lies_below_it(package: str, forbidden: set[str]) -> None:
    done = run(f"import sys, {package}; print(*{{name.split('.')[0] for name in sys.modules}})")
    assert done.returncode == 0, done.stderr
    assert not forbidden & set(done.stdout.split())


@pytest.mark.parametrize(
    ("package", "missing", "extra"),
    [("outlook_torch", "torch", "torch"), ("outlook_jax", "jax", "jax"), ("outlook_jax", "flax", "jax")],
)
def test_a_twin_without_its_framework_names_the_extra(package: str, missing: str, extra: str) -> None:
    hide = f"""
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {missing!r}:
            raise ModuleNotFoundError(name)
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == {missing!r} else real(name, *rest)
sys.meta_path.insert(0, Hidden())
import {package}
"""
    done = run(hide)
    assert done.returncode == 1
    assert f"ImportError: {package} needs {missing}, which is not installed" in done.stderr
    assert f"pip install 'outlook-attention[{extra}]'" in done.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_is_typed(package: str) -> None:
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).with_name("py.typed").exists()
