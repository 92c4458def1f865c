"""What the sdist and the wheel contain."""

import tarfile
from email import message_from_bytes
from pathlib import Path
from zipfile import ZipFile

import pytest

from parity_tests.packages.build import ROOT, Built, build

PACKAGES = ("outlook_common", "outlook_jax", "outlook_parity", "outlook_torch")
DATA = {
    "outlook_common/imagenet_classes.txt",
    "outlook_parity/report/page.html",
    "outlook_parity/report/report.schema.json",
    *(f"{package}/py.typed" for package in PACKAGES),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(tmp_path_factory.mktemp("built"))


def test_the_wheel_has_the_four_packages_their_data_and_the_licence_and_nothing_else(built: Built) -> None:
    modules = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    about = f"{built.wheel.name.removesuffix('-py3-none-any.whl')}.dist-info"
    notes = {f"{about}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")}
    with ZipFile(built.wheel) as wheel:
        assert set(wheel.namelist()) == modules | DATA | notes


def test_the_wheel_names_its_program_plugin_and_extras(built: Built) -> None:
    with ZipFile(built.wheel) as wheel:
        read = {Path(name).name: wheel.read(name) for name in wheel.namelist() if ".dist-info/" in name}
    entry_points = read["entry_points.txt"].decode()
    assert "outlook = outlook_parity.cli.app:main" in entry_points
    assert "outlook_parity = outlook_parity.pytest_plugin" in entry_points
    metadata = message_from_bytes(read["METADATA"])
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"jax", "torch", "parity"} <= set(metadata.get_all("Provides-Extra", []))


def test_the_sdist_has_tests_and_docs_and_builds_the_same_wheel(built: Built, tmp_path: Path) -> None:
    with tarfile.open(built.sdist) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    assert (source / "parity_tests/conftest.py").exists()
    assert (source / "docs/weights.md").exists()
    again = build(tmp_path / "again", source)
    assert again.wheel.name == built.wheel.name
    assert again.wheel.read_bytes() == built.wheel.read_bytes()
