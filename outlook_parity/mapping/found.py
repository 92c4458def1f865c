"""In words: what was found by what, and what was not found. Imports no framework."""

from outlook_common.text import listed
from outlook_parity.mapping.names import Names

# The most that is said, in characters.
MOST = 2000

# How many weights without counterpart are listed.
_LISTED = 12


def note_on_correspondence(names: Names) -> str | None:
    """Return which weights were found by what, None if all were by name.

    For example "weights that correspond: 30 by names, 2 by structure, 1 by equal values".
    """
    counts, candidates = names.found.counts, names.found.candidates
    left = [name for name in names.found.left if name in names.expected]
    if not (candidates or left or counts.get("structure") or counts.get("values")):
        return None
    words = {"map": "by the map", "names": "by names", "structure": "by structure", "values": "by equal values"}
    by = ", ".join(f"{counts[how]} {word}" for how, word in words.items() if counts.get(how)) or "none"
    parts = [f"weights that correspond: {by}"]
    if candidates:
        each = [f"{name} (may be {listed(those, 3)})" if those else name for name, those in candidates.items()]
        parts.append(f"{len(candidates)} of JAX without counterpart: {listed(each, _LISTED)}")
    if left:
        parts.append(f"{len(left)} of PyTorch without counterpart: {listed(left, _LISTED)}")
    if candidates or left:
        parts.append("name them below [weights] in --map; --write-map writes what was found")
    text = "; ".join(parts)
    return text if len(text) <= MOST else f"{text[: MOST - 1]}…"
