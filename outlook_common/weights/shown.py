"""Names from files, safe to print: what could steer a terminal, or look like another letter, is escaped."""

from collections.abc import Iterable


def shown(name: object) -> str:
    """Return a name as it may be printed, anything but plain ASCII as its escape."""
    text = str(name)
    return text if text.isascii() and text.isprintable() else ascii(text)[1:-1]


def listed(names: Iterable[object], most: int = 8, *, between: str = ", ") -> str:
    """Return names as they may be printed, of more than `most` the first and how many are left out.

    For example "a, b, … and 12 more".
    """
    every = list(names)
    left_out = [f"… and {len(every) - most} more"] if len(every) > most else []
    return between.join([*map(shown, every[:most]), *left_out])
