"""Names for messages: escaped, shortened lists, closest match."""

from collections.abc import Iterable
from difflib import get_close_matches


def printable(name: object) -> str:
    """Return a name with everything but printable ASCII escaped.

    Names come from files: they could steer a terminal, or hold letters that look like others.
    """
    text = str(name)
    return text if text.isascii() and text.isprintable() else ascii(text)[1:-1]


def listed(names: Iterable[object], most: int = 8, *, between: str = ", ") -> str:
    """Return printable names, joined; beyond `most`, the first and how many are left out.

    For example "a, b, … and 12 more".
    """
    every = list(names)
    left_out = [f"… and {len(every) - most} more"] if len(every) > most else []
    return between.join([*map(printable, every[:most]), *left_out])


def closest(name: object, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Return the most similar known name, None if none is at least `cutoff` (0 to 1) similar."""
    return next(iter(get_close_matches(str(name), list(known), n=1, cutoff=cutoff)), None)
