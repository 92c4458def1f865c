"""Programs within programs of JAX."""

from typing import Any


def bodies_of(equation: Any) -> list[Any]:
    """Return the jaxprs that an operation runs, as those of a loop or a call."""
    found = []
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            body = getattr(part, "jaxpr", part)
            if hasattr(body, "eqns"):
                found.append(body)
    return found
