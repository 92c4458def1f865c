"""Type checkers see the packages as a user has them: installed, with nothing configured."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from sysconfig import get_path
from venv import create
from zipfile import ZipFile

import pytest

from parity_tests.packages.build import ROOT, build

pytestmark = pytest.mark.slow  # a minute: type checkers read both frameworks anew


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with this one's frameworks, and the packages of the wheel."""
    path = tmp_path_factory.mktemp("typing")
    venv = path / "venv"
    create(venv)
    site = Path(get_path("purelib", vars={"base": str(venv), "platbase": str(venv)}))
    with ZipFile(build(path / "dist").wheel) as wheel:
        wheel.extractall(site)
    frameworks = [path for path in sys.path if path.endswith("site-packages")]
    (site / "frameworks.pth").write_text("\n".join(frameworks))
    return venv / "bin" / "python"


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A user's program, in a folder of its own."""
    path = tmp_path / "user.py"
    path.write_text((ROOT / "parity_tests/support/typed_user.py").read_text())
    return path


def test_mypy_finds_the_types_that_a_users_program_asserts(
    python: Path, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mypy = pytest.importorskip("mypy.api", reason="not run: mypy is not installed")
    monkeypatch.chdir(program.parent)  # mypy would read the packages of this checkout
    cache = f"--cache-dir={program.parent / 'cache'}"
    found, errors, status = mypy.run(
        ["--strict", "--config-file=", cache, f"--python-executable={python}", str(program)]
    )
    assert (found.strip(), errors, status) == ("Success: no issues found in 1 source file", "", 0)


def test_pyright_finds_the_types_that_a_users_program_asserts(python: Path, program: Path) -> None:
    pyright = shutil.which("pyright")
    if pyright is None:
        pytest.skip("not run: pyright is not installed (npm install --global pyright)")
    (program.parent / "pyrightconfig.json").write_text(
        json.dumps({"include": ["user.py"], "typeCheckingMode": "strict"})
    )
    done = subprocess.run(
        [pyright, "--project", program.parent, "--pythonpath", python], capture_output=True, text=True, timeout=600
    )
    assert (done.returncode, done.stdout.strip()) == (0, "0 errors, 0 warnings, 0 informations"), done.stdout
