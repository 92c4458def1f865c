"""Architecture: what imports what, what is public, and what is said when a framework is missing."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules, walk_packages
from types import ModuleType

import pytest

from parity_tests import public_api

ROOT = Path(__file__).parents[1]
PACKAGES = ("outlook_common", "outlook_torch", "outlook_jax", "outlook_parity")
FRAMEWORKS = {"torch", "jax", "flax"}

# What each package may import of this repository, besides itself.
BELOW = {
    "outlook_common": set(),
    "outlook_torch": {"outlook_common"},
    "outlook_jax": {"outlook_common"},
    "outlook_parity": {"outlook_common", "outlook_torch", "outlook_jax"},
    "examples": {"outlook_common", "outlook_torch", "outlook_jax", "outlook_parity"},
    "benchmarks": {"outlook_common", "outlook_torch", "outlook_jax", "outlook_parity"},
    "parity_tests": {"outlook_common", "outlook_torch", "outlook_jax", "outlook_parity", "benchmarks", "examples"},
}

# What each room of a package may import of the same package's rooms; "" is the package's own files.
ROOMS = {
    "outlook_torch": {"ops": set(), "": {"ops"}},
    "outlook_jax": {"ops": set(), "": {"ops"}},
    "outlook_common.weights": {
        "errors": set(),
        "io": {"errors"},
        "tables": {"errors"},
        "formats": {"errors", "io", "tables"},
        "": {"errors", "io", "tables", "formats"},
    },
    "outlook_parity": {
        "core": set(),
        "mapping": {"core"},
        "compare": {"core"},
        "diagnose": {"core", "compare"},
        "models": {"core", "mapping", "compare", "diagnose"},
        "backends": {"core", "mapping", "models"},
        "report": {"core", "diagnose"},
        "": {"core", "mapping", "compare", "diagnose", "models", "backends", "report"},
        "trace": {"core", "mapping", "compare", "diagnose", "models", "backends", "report", ""},
        "cli": {"core", "mapping", "compare", "diagnose", "models", "backends", "report", "", "trace"},
    },
}


def sources(package: str) -> Iterator[tuple[str, Path]]:
    """Yield every module of a package as (dotted name, file)."""
    for path in sorted((ROOT / package.replace(".", "/")).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if path.name == "__init__.py" else parts), path


@cache
def modules() -> frozenset[str]:
    return frozenset(module for package in BELOW for module, _ in sources(package))


def imports(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports, inside functions and for type checkers too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            within = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from within & modules() or {node.module}


def room(module: str, package: str) -> str:
    """Return the room of a package that a module lies in, "" for the package itself."""
    name = module.removeprefix(package).lstrip(".").partition(".")[0]
    return name if name in ROOMS[package] else ""


@pytest.mark.parametrize("package", BELOW)
def test_a_package_names_only_packages_below_it(package: str) -> None:
    allowed = {package} | BELOW[package]
    upward = {
        f"{module} imports {name}"
        for module, path in sources(package)
        for name in imports(path)
        if (top := name.partition(".")[0]) in BELOW and top not in allowed
    }
    assert not upward


@pytest.mark.parametrize("package", ROOMS)
def test_a_room_imports_only_the_rooms_below_it(package: str) -> None:
    upward = {
        f"{module} imports {name}"
        for module, path in sources(package)
        for name in imports(path)
        if (name == package or name.startswith(f"{package}."))
        and (own := room(module, package)) != (other := room(name, package))
        and other not in ROOMS[package][own]
    }
    assert not upward


def test_the_registry_is_the_one_door_to_this_packages_own_models() -> None:
    inside = ("outlook_parity.models.", "outlook_parity.diagnose.attention_steps")
    outside = {
        f"{module} imports {name}"
        for module, path in sources("outlook_parity")
        if not module.startswith(inside)
        for name in imports(path)
        if name.partition(".")[0] in ("outlook_torch", "outlook_jax")
    }
    assert not outside


def test_every_folder_of_the_verifier_is_a_room_of_the_table() -> None:
    folders = {path.parent.name for path in (ROOT / "outlook_parity").glob("*/__init__.py")}
    assert folders == ROOMS["outlook_parity"].keys() - {""}


def test_the_public_names_are_those_of_the_list() -> None:
    """A change of the list is a change of the public surface: `python -m parity_tests.public_api` writes it anew."""
    assert public_api.public_names() == public_api.LIST.read_text().split()


@pytest.mark.parametrize("module", public_api.MODULES)
def test_every_public_name_is_there(module: str) -> None:
    found = import_module(module)
    assert [name for name in public_api.names(module) if not hasattr(found, name)] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_is_hidden_by_what_its_package_exports(package: str) -> None:
    """`import outlook_jax.x` gives the module x, whatever `outlook_jax` exports."""
    packages = [package, *(found.name for found in walk_packages([ROOT / package], f"{package}.") if found.ispkg)]
    hidden = [
        f"{name}.{module.name}"
        for name in packages
        for module in iter_modules(import_module(name).__path__)
        if not isinstance(getattr(import_module(name), module.name, None), ModuleType | None)
    ]
    assert hidden == []


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("imported", "forbidden"),
    [
        (
            sorted(module for module, _ in sources("outlook_common")),
            FRAMEWORKS | {"orbax", "PIL", "outlook_torch", "outlook_jax", "outlook_parity"},
        ),
        (
            sorted({module for module, _ in sources("outlook_torch")} - {"outlook_torch.timm"}),
            {"jax", "flax", "outlook_jax", "outlook_parity"},
        ),
        (sorted(module for module, _ in sources("outlook_jax")), {"torch", "outlook_torch", "outlook_parity"}),
        (
            ["outlook_parity", "outlook_parity.cli.app", "outlook_parity.pytest_plugin"],
            FRAMEWORKS | {"outlook_torch", "outlook_jax", "matplotlib", "sklearn"},
        ),
    ],
    ids=PACKAGES,
)
def test_a_package_loads_only_what_lies_below_it(imported: list[str], forbidden: set[str]) -> None:
    """The bare install has no framework: `outlook_common` whole, and the command line until a command runs."""
    done = run(f"import sys, {', '.join(imported)}; print(*{{name.split('.')[0] for name in sys.modules}})")
    assert done.returncode == 0, done.stderr
    assert not forbidden & set(done.stdout.split())


@pytest.mark.parametrize(
    ("twin", "framework"), [("outlook_torch", "import torch"), ("outlook_jax", "import jax; from flax import nnx")]
)
def test_importing_a_twin_loads_nothing_slow_besides_its_framework(twin: str, framework: str) -> None:
    """Compilers, meshes, checkpoints and what reads files wait until they are used."""

    def loaded(statement: str) -> set[str]:
        done = run(f"{statement}; import sys; print(*sys.modules)")
        assert done.returncode == 0, done.stderr
        return set(done.stdout.split())

    added = {name for name in loaded(f"import {twin}") - loaded(framework) if name.partition(".")[0] != twin}
    of_this_repository = {name for name in added if name.startswith("outlook_")}
    assert of_this_repository == {
        "outlook_common",
        *(f"outlook_common.{module}" for module in ("config", "constants", "dispatch", "extras", "geometry")),
        *(
            f"outlook_common.{module}"
            for module in ("interpolation", "lazy", "models", "taps", "text", "version", "volo")
        ),
    }
    others = {name for name in added - of_this_repository if name.partition(".")[0] not in sys.stdlib_module_names}
    assert {name.partition(".")[0] for name in others} <= {"jax", "jaxtyping", "numpy", "torch"}
    assert len({name for name in others if not name.startswith("jaxtyping")}) <= 5


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
