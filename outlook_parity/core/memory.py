"""A budget of memory, and what each level takes of it. Imports no framework."""

import ctypes
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_UNITS = {
    unit: base**power
    for base, prefixes in ((1000, ("", "K", "M", "G", "T")), (1024, ("", "Ki", "Mi", "Gi", "Ti")))
    for power, prefix in enumerate(prefixes)
    for unit in (f"{prefix}B".lower(), prefix.lower())
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", flags=re.IGNORECASE)

# Bytes of a number in float64: the truth of every precision is computed in it.
NUMBER = 8

# Arrays of the size of a tensor that its comparison holds at once.
COMPARED = 5

# Bytes that compilers and their programs take, of whatever model.
PROGRAMS = 96 << 20


@dataclass(frozen=True)
class Sizes:
    """How many numbers a pair of twins holds.

    Attributes:
        weights: of the larger twin.
        largest: of the largest weight or output.
        live: of intermediate results that are needed at the same time, at most.
        kept: of all intermediate results: a backward pass may need each.
    """

    weights: int
    largest: int
    live: int
    kept: int


def bytes_of(size: str) -> int:
    """Return "2GiB", "500 MB" or "1.5g" in bytes.

    Raises:
        ValueError: it is no size.
    """
    match = _SIZE.fullmatch(size)
    if match is None or match[2].lower() not in _UNITS or not float(match[1]):
        raise ValueError(f"memory must be a size as in '2GiB', '500 MB' or '1.5G', got {size!r}")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def shown(size: float) -> str:
    """Return a number of bytes in words."""
    for unit, length in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if size >= length:
            return f"{size / length:.1f} {unit}"
    return f"{size / 1024:.0f} KiB"


def needed(sizes: Sizes) -> dict[str, int]:
    """Return what each level takes in bytes, besides the models as they are given.

    One twin runs at a time, on a copy of its weights in float64; what it computed waits in a file, and is read again
    one tensor at a time. Convolutions unfold their inputs. A backward pass has the gradients besides.
    """
    copy, comparing = sizes.weights, COMPARED * sizes.largest
    forward = max(copy + 2 * sizes.live, comparing)
    backward = max(2 * copy + sizes.kept + 2 * sizes.largest, comparing)
    numbers = {"forward": forward, "layers": forward, "gradients": backward, "training": backward}
    return {level: NUMBER * count + PROGRAMS for level, count in numbers.items()}


def too_large(levels: Iterable[str], sizes: Sizes, budget: int, resident: int) -> dict[str, str]:
    """Return the levels that take more than the budget, and why in words.

    Args:
        levels: that are asked for.
        sizes: of the twins.
        budget: bytes that the process may hold.
        resident: bytes that it holds now, with both models.
    """
    takes = needed(sizes)
    advice = "`outlook trace` runs each twin in a process of its own, `outlook compare` compares the traces"
    return {
        level: f"takes about {shown(resident + takes[level])} of memory, {shown(budget)} were given; {advice}"
        for level in levels
        if resident + takes[level] > budget
    }


def resident_bytes() -> int:
    """Return how many bytes this process holds and does not give back, 0 where the system does not tell."""
    release()
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def release() -> None:
    """Give freed memory back to the system, where the C library has a call for it: glibc keeps much of it else."""
    if (trim := _of_c_library("malloc_trim")) is not None:
        trim(0)


# Of glibc's `mallopt`: blocks of so many bytes come from the system one by one, and go back to it when they are freed.
_MMAP_THRESHOLD, _LARGE_BLOCK = -3, 1 << 22


def release_large_blocks() -> None:
    """Give blocks of `_LARGE_BLOCK` bytes back as soon as they are freed, from now on in this process: for programs."""
    if (set_option := _of_c_library("mallopt")) is not None:
        set_option(_MMAP_THRESHOLD, _LARGE_BLOCK)


@cache
def _of_c_library(name: str) -> Callable[..., int] | None:
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # another C library or system
        return None
    return function
