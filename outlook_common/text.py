"""Names for messages: escaped, shortened lists, closest match."""

from collections.abc import Iterable
from difflib import SequenceMatcher


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
    """Return the most similar known name, None if none is at least `cutoff` (0 to 1) similar.

    Of equally similar names the first; `difflib.get_close_matches` takes the last in the alphabet.
    """
    matcher = SequenceMatcher(b=str(name))

    def similarity(candidate: str) -> float:
        matcher.set_seq1(candidate)
        return matcher.ratio()

    best = max(known, key=similarity, default=None)
    return best if best is not None and similarity(best) >= cutoff else None
