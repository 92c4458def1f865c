"""The lower bounds of pyproject.toml are the versions that `make test-lowest` runs."""

import tomllib

from packaging.requirements import Requirement
from packaging.version import Version

from parity_tests.packages.build import ROOT

EXTRAS = ("jax", "torch", "images", "photos", "plots", "h5")
# Of PyTorch, older versions cannot be had everywhere as builds for CPUs; jaxlib comes with JAX.
EXCEPT = {"torch", "jaxlib"}


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    found = [line.split("#")[0].split("==") for line in lines if not line.startswith("#")]
    return {name: Version(version.strip()) for name, version in found}


def bounds() -> dict[str, Version]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [
        *project["dependencies"],
        *(line for extra in EXTRAS for line in extras[extra]),
    ]
    found = [Requirement(line) for line in lines]
    return {
        one.name: Version(specifier.version)
        for one in found
        for specifier in one.specifier
        if specifier.operator == ">="
    }


def test_each_lower_bound_is_the_version_that_is_run() -> None:
    lowest, allowed = pins(), bounds()
    assert {name: lowest[name] for name in lowest.keys() - EXCEPT} == {
        name: allowed[name] for name in allowed.keys() - EXCEPT
    }


def test_pytorch_which_is_not_run_at_its_bound_is_at_least_as_new() -> None:
    assert pins()["torch"] >= bounds()["torch"]
    assert pins()["jaxlib"] == pins()["jax"]
