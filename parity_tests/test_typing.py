"""Type checkers see the packages as a user has them: installed, with nothing configured."""

import sys
from pathlib import Path
from sysconfig import get_path
from venv import create
from zipfile import ZipFile

import pytest

from parity_tests.packages.build import ROOT, build


@pytest.mark.slow  # a minute: mypy reads both frameworks anew
def test_a_users_program_has_the_types_that_it_asserts(tmp_path: Path) -> None:
    mypy = pytest.importorskip("mypy.api", reason="not run: mypy is not installed")
    venv = tmp_path / "venv"
    create(venv)  # the frameworks are those of this environment, the packages those of the wheel
    site = Path(get_path("purelib", vars={"base": str(venv), "platbase": str(venv)}))
    with ZipFile(build(tmp_path / "dist").wheel) as wheel:
        wheel.extractall(site)
    frameworks = [path for path in sys.path if path.endswith("site-packages")]
    (site / "frameworks.pth").write_text("\n".join(frameworks))
    program = tmp_path / "user.py"
    program.write_text((ROOT / "parity_tests/support/typed_user.py").read_text())
    found, errors, status = mypy.run(
        [
            "--strict",
            "--config-file=",
            f"--cache-dir={tmp_path / 'cache'}",
            f"--python-executable={venv / 'bin/python'}",
            str(program),
        ]
    )
    assert (found.strip(), errors, status) == ("Success: no issues found in 1 source file", "", 0)
