"""Which known name somebody may have meant."""

from collections.abc import Iterable
from difflib import SequenceMatcher

# Below this similarity (of 0…1) a name is not worth suggesting; the same as difflib's own.
CUTOFF = 0.6


def nearest(name: str, known: Iterable[str], *, cutoff: float = CUTOFF) -> str | None:
    """Return the most similar of the known names, of equals the first; None if none is similar enough."""
    matcher = SequenceMatcher(b=str(name))

    def similarity(candidate: str) -> float:
        matcher.set_seq1(candidate)
        return matcher.ratio()

    best = max(known, key=similarity, default=None)
    return best if best is not None and similarity(best) >= cutoff else None
