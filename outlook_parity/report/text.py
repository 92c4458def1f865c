"""Messages of bounded length."""

from outlook_parity.core.check import Check

MOST_CHARACTERS = 2000

_NOTE = 40  # characters at most of " … and 1234 more characters"


def shortened(text: str, most: int = MOST_CHARACTERS) -> str:
    """Return a text of at most `most` characters; of a longer one the start, and how much is left out."""
    if len(text) <= most:
        return text
    kept = most - _NOTE
    return f"{text[:kept]} … and {len(text) - kept} more characters"


def finding(check: Check) -> str:
    """Return what a check found: its note, or the numbers."""
    return shortened(check.note) or f"found {check.measured:.3g}, at most {check.bound:.3g}"
