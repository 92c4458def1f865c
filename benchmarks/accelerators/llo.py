"""Count the cycles of Pallas kernels, which XLA:TPU does not estimate: one per VLIW bundle of what Mosaic compiled.

A bundle in a loop counts as often as the loop runs. What a kernel waits for memory is not in it.
"""

import re
from dataclasses import dataclass
from pathlib import Path

# "0x8c LB: >> { … }": the address, whether a loop's body begins, a ">" for each loop around it; an empty one has none.
_BUNDLE = re.compile(r"^\s*(?:0x)?[0-9a-f]+ *([A-Z]{2})? *: *(>*) *\{(\})?")
_BOUND = re.compile(r"%(p\w+) = scmp\.ge\.s32\.totalorder (?:\(!?%\w+\), )?%\w+, (\d+)")
_BACK = re.compile(r"sbr\.rel \(!%(p\w+)\) target = \$region(\d+)")


@dataclass
class _Loop:
    """A loop: how many rounds there are, and the cycles of one."""

    rounds: int
    cycles: int = 0


def kernel_cycles(folder: Path, name: str) -> int:
    """Return the cycles of one call of a kernel, of what libtpu dumped into a folder; FileNotFoundError if nothing."""
    found = [
        path for path in folder.rglob("*-final_bundles.txt") if re.match(rf"\d+-{re.escape(name)}-\d+-", path.name)
    ]
    found = [path for path in found if "schedule-analysis" not in path.name]
    if not found:
        raise FileNotFoundError(f"libtpu dumped no bundles of {name!r} into {folder}")
    return cycles(max(found).read_text())


def cycles(bundles: str) -> int:
    """Return how many bundles run; ValueError if a loop ends at a number that is not in the text."""
    bounds = dict(_BOUND.findall(bundles))
    rounds = {region: int(bounds[bound]) for bound, region in _BACK.findall(bundles) if bound in bounds}
    loops = [_Loop(rounds=1)]
    for line in bundles.splitlines():
        if not (match := _BUNDLE.match(line)):
            continue
        depth = len(match[2])
        while len(loops) > depth + (match[1] != "LB") and not match[3]:
            _close(loops)
        if match[1] == "LB":
            starts = [region for region in re.findall(r"Start region (\d+)", line) if region in rounds]
            if not starts:
                raise ValueError(f"a loop of unknown length begins with {line.strip()[:100]!r}")
            loops.append(_Loop(rounds[starts[0]]))
        loops[-1].cycles += 1
    while len(loops) > 1:
        _close(loops)
    return loops[0].cycles


def _close(loops: list[_Loop]) -> None:
    loop = loops.pop()
    loops[-1].cycles += loop.cycles * loop.rounds
