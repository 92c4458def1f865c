"""Messages of bounded length, and lines whose names are never broken. Imports no framework."""

import re
from collections.abc import Iterator

from outlook_parity.core.check import Check

MOST_CHARACTERS = 2000

_NOTE = 40  # characters at most of " … and 1234 more characters"

# What lies between the items of a long message, which is cut between two of them.
_BETWEEN = ("\n", "; ")


def shortened(text: str, most: int = MOST_CHARACTERS) -> str:
    """Return a text of at most `most` characters; of a longer one the start, and how much is left out.

    A list is cut between two items, and the items that are left out are counted; else characters are.
    """
    if len(text) <= most:
        return text
    room = most - _NOTE
    for between in _BETWEEN:
        items = text.split(between)
        kept = text.count(between, 0, room + len(between))
        if kept and len(items) > 2:
            start = between.join(items[:kept])
            if len(start) <= room:
                return f"{start}{between}… and {len(items) - kept} more"
    return f"{text[:room]} … and {len(text) - room} more characters"


def finding(check: Check) -> str:
    """Return what a check found: its note, or the numbers."""
    if check.note:
        return shortened(check.note)
    if check.measured is None:
        return check.verdict
    return f"found {check.measured:.3g}, at most {check.bound:.3g}"


def shortened_name(name: str, width: int) -> str:
    """Return a name of at most `width` characters; of a longer one the middle is left out, between two parts if it can.

    For example "encoder.….output.dense", or "SGD: ….0.norm.weight".
    """
    if len(name) <= width:
        return name
    first, *rest = re.findall(r"[^. ]*[. ]*", name.rstrip(". "))[:-1] or [name]
    for start in range(1, len(rest)):
        before = rest[start - 1][-1:]  # what lies between the parts: a dot or a space
        short = f"{first}…{before}{''.join(rest[start:])}"
        if len(short) <= width:
            return short
    kept = max(width - 1, 2)
    return f"{name[: kept // 3]}…{name[-(kept - kept // 3) :]}"


def wrapped(text: str, width: int, *, first: str = "", rest: str = "") -> Iterator[str]:
    """Yield lines of at most `width` characters, broken at spaces alone; a word that does not fit is shortened.

    Args:
        text: of several lines, perhaps.
        width: of the terminal.
        first: what stands before the first line.
        rest: what stands before the others.
    """
    indent = first
    for paragraph in text.splitlines():
        line = indent
        for word in paragraph.split():
            fitting = shortened_name(word, max(width - len(rest), 8))
            empty = line == indent
            if not empty and len(line) + 1 + len(fitting) > width:
                yield line
                line, indent, empty = rest, rest, True
            line += fitting if empty else f" {fitting}"
        yield line
        indent = rest
