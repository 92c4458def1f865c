"""Types and shapes in the signatures, checked at every call: a hook that must come before the first import.

A module with shapes in its annotations is decorated by jaxtyping, whose every call costs 20 µs and more. So is one that
imports names for its annotations alone, which beartype would look for in vain; jaxtyping then takes what it finds. The
others are beartype's own: with jaxtyping verifying models and reading checkpoints took a quarter more time.
"""

import sys
from collections.abc import Iterator
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from inspect import CO_NESTED
from pathlib import Path
from types import CodeType
from typing import Any

import beartype._check.code.codemain as checks
import beartype.claw._ast._clawaststar as decorators
import jaxtyping
from beartype import BeartypeConf, BeartypeDecorPlace
from beartype.claw import beartype_packages

ROOT = Path(__file__).parents[2]
SHAPED = ("outlook_torch", "outlook_jax")
# Few shapes in signatures; the other modules are checked in tests that are marked `unchecked` too.
TYPED = ("outlook_common", "outlook_parity")
# Configurations are made of what files say, and refuse it themselves.
UNCHECKED = ("outlook_common.config",)


def check_types() -> None:
    """Decorate the functions of all packages as they are imported."""
    # Of a collection beartype checks one item, at random; here the first: a wrong hint must not fail by chance.
    checks.getrandbits = lambda _: 0  # type: ignore[attr-defined]
    decorators.__beartype__ = once(decorators.__beartype__)  # type: ignore[attr-defined]
    jaxtyping.jaxtyped = once(jaxtyping.jaxtyped)
    # Not pytest's option --jaxtyping-packages: with several packages it cuts a type checker that is a call, as this one
    # is, at its commas (jaxtyping 0.3.11), and it refuses `outlook_parity`, which pytest has imported for its plugin.
    others = frozenset(_for_jaxtyping())
    sys.meta_path.insert(0, _PlainFinder())
    beartype_packages(
        TYPED,
        # Below other decorators, which may change a signature, as jaxtyping does.
        conf=BeartypeConf(
            is_pep484_tower=True,
            claw_decor_place_func=BeartypeDecorPlace.FIRST,
            claw_skip_package_names=others.union(UNCHECKED),
        ),
    )
    jaxtyping.install_import_hook(
        [*SHAPED, *others], "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
    )


def once(decorator: Any) -> Any:
    """Return a decorator that leaves alone what it has decorated before: a function that each call of another makes.

    To decorate takes 1 to 5 ms, a twentieth of the time of all tests.
    """
    decorated: set[tuple[str, CodeType]] = set()

    @wraps(decorator)
    def factory(*args: Any, **options: Any) -> Any:
        made = decorator(*args, **options)

        def decorate(item: Any) -> Any:
            code = getattr(item, "__code__", None)
            if code is None or not code.co_flags & CO_NESTED:
                return made(item)
            if (code.co_filename, code) in decorated:  # code is equal without its file
                return item
            decorated.add((code.co_filename, code))
            return made(item)

        return made if args else decorate

    return factory


class _PlainFinder(MetaPathFinder):
    """Finds modules of `TYPED` as Python does: pytest rewrites those of its plugins' packages, past beartype's hook."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return PathFinder.find_spec(name, path, target) if name.startswith(tuple(f"{p}." for p in TYPED)) else None


def _for_jaxtyping() -> Iterator[str]:
    for package in TYPED:
        for file in (ROOT / package).rglob("*.py"):
            text = file.read_text()
            if file.name != "__init__.py" and ("from jaxtyping" in text or "if TYPE_CHECKING:" in text):
                yield ".".join(file.relative_to(ROOT).with_suffix("").parts)
