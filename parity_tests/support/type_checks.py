"""Types and shapes in the signatures, checked at every call: a hook that must come before the first import.

A module with shapes in its annotations is decorated by jaxtyping, whose every call costs 20 µs and more. So is one that
imports names for its annotations alone, which beartype would look for in vain; jaxtyping then takes what it finds. The
others are beartype's own: a quarter of the time of a verification.
"""

from collections.abc import Iterator
from pathlib import Path

import jaxtyping
from beartype import BeartypeConf, BeartypeDecorPlace
from beartype.claw import beartype_packages

ROOT = Path(__file__).parents[2]
SHAPED = ("outlook_common", "outlook_torch", "outlook_jax")
# Without a shape in any signature, and checked in tests that are marked `unchecked` too.
TYPED = ("outlook_parity",)


def check_types() -> None:
    """Decorate the functions of all packages as they are imported."""
    # Not pytest's option --jaxtyping-packages: with several packages it cuts a type checker that is a call, as this one
    # is, at its commas (jaxtyping 0.3.11), and it refuses `outlook_parity`, which pytest has imported for its plugin.
    late = frozenset(_imported_for_types_alone())
    beartype_packages(
        TYPED,
        # Below other decorators, which may change a signature, as jaxtyping does.
        conf=BeartypeConf(
            is_pep484_tower=True, claw_decor_place_func=BeartypeDecorPlace.FIRST, claw_skip_package_names=late
        ),
    )
    jaxtyping.install_import_hook(
        [*SHAPED, *late], "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
    )


def _imported_for_types_alone() -> Iterator[str]:
    for package in TYPED:
        for file in (ROOT / package).rglob("*.py"):
            if file.name != "__init__.py" and "if TYPE_CHECKING:" in file.read_text():
                yield ".".join(file.relative_to(ROOT).with_suffix("").parts)
