"""A Python process as an environment would have it that holds one extra of this package: all else cannot be imported.

Stands for a virtual environment of its own, which takes minutes to make. What an extra brings follows from
pyproject.toml and from what the installed packages say they require.
"""

import sys
import tomllib
from collections.abc import Iterable, Sequence
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def installed_by(needs: Iterable[str]) -> set[str]:
    """Return the distributions that `pip install` of the bare package brings, with extras of it, or other packages.

    Args:
        needs: extras, or names of distributions.
    """
    waiting = [Requirement(line) for line in PROJECT["dependencies"]]
    for need in needs:
        waiting += [Requirement(f"{PROJECT['name']}[{need}]" if need in EXTRAS else need)]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) not in seen:
            seen.add((name, extras))
            waiting += _requirements(name, extras)
    return {name for name, _ in seen}


def _requirements(name: str, extras: frozenset[str]) -> list[Requirement]:
    if name == PROJECT["name"]:
        return [Requirement(line) for extra in extras for line in EXTRAS[extra]]
    try:
        lines = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []  # of another platform, say
    chosen = [{"extra": extra} for extra in ("", *extras)]
    return [
        found
        for found in map(Requirement, lines)
        if found.marker is None or any(found.marker.evaluate(extra) for extra in chosen)
    ]


def hide_all_but(needs: Iterable[str]) -> None:
    """Let this process import nothing installed but what `installed_by` names, as if it were not there."""
    present = installed_by(needs)
    absent = frozenset(
        module
        for module, distributions in metadata.packages_distributions().items()
        if not present & {canonicalize_name(name) for name in distributions}
    )
    loaded = absent & {name.partition(".")[0] for name in sys.modules}
    # Tests of this package import it from the folder they run in, installed or not.
    ours = {"parity_tests", "outlook_common", "outlook_torch", "outlook_jax", "outlook_parity"}

    class Finder(PathFinder):
        @classmethod
        def find_spec(
            cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
        ) -> ModuleSpec | None:
            top = fullname.partition(".")[0]
            return None if top in absent - ours else super().find_spec(fullname, path, target)

        @classmethod
        def find_distributions(cls, *arguments: object, **options: object) -> Iterable[metadata.Distribution]:
            found = super().find_distributions(*arguments, **options)
            return (each for each in found if canonicalize_name(each.metadata["Name"]) in present)

    sys.meta_path[:] = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
    if early := loaded - ours - {"packaging", "_distutils_hack"}:
        raise AssertionError(f"imported before they were hidden: {sorted(early)}")
