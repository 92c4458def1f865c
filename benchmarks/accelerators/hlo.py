"""Read a compiled program's text: its operations, their bytes, and loops."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# Each is there in the text and costs nothing by itself.
FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "conditional", "call"}
COLLECTIVES = r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("

_BITS = {"pred": 8, "bf16": 16} | {f"{kind}{bits}": bits for kind in "fsu" for bits in (8, 16, 32, 64)}
_OPERATION = re.compile(r"^\s*(?:ROOT )?(%?[\w.\-]+) = ((?:\((?:[^()]|\([^()]*\))*\)|\S+)) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"\b(\w+)\[([\d,]*)\]")


class Operation(NamedTuple):
    """One operation: its kind, the bytes of operands and results, the rest of its line, how often it runs."""

    kind: str
    bytes: int
    text: str
    times: int


def operations(program: str) -> list[Operation]:
    """Return the operations that cost something, those in loops with their trip counts."""
    return list(_operations(_computations(program), "ENTRY", 1))


def collectives(program: str) -> list[str]:
    """Return the kinds of operations that exchange data between devices."""
    return re.findall(COLLECTIVES, program)


def exchanged(program: str) -> dict[str, int]:
    """Return kind -> bytes of the whole arrays that collectives gather or reduce in a run: what all devices have."""
    found: dict[str, int] = {}
    computations = _computations(program)
    for operation in _operations(computations, "ENTRY", 1):
        kind = operation.kind.removesuffix("-start")
        if whole := _scattered(computations, operation):
            found["reduce-scatter"] = found.get("reduce-scatter", 0) + operation.times * whole
        if not re.match(COLLECTIVES, f" {kind}("):
            continue
        match = _OPERATION.match(operation.text)
        assert match is not None
        results = nbytes(match[2])
        operands = operation.bytes - results
        if kind != operation.kind and match[2].startswith("("):  # its results are the operands, and what they become
            results -= operands
        found[kind] = found.get(kind, 0) + operation.times * max(results, operands)
    return found


def _scattered(computations: dict[str, list[str]], operation: Operation) -> int:
    """Return the bytes that a fusion reduces: XLA:TPU's reduce-scatter, an all-reduce and each device's cut of it."""
    calls = re.search(r"calls=(%[\w.\-]+)", operation.text) if operation.kind == "fusion" else None
    inside = [_OPERATION.match(line) for line in computations[calls[1]]] if calls else []
    return sum(nbytes(match[2]) for match in inside if match and match[3] == "all-reduce")


def nbytes(shapes: str) -> int:
    """Return the bytes of all arrays that stand in a type, without a platform's tiles."""
    return sum(
        math.prod(int(n) for n in sizes.split(",") if n) * _BITS[dtype] // 8
        for dtype, sizes in _SHAPE.findall(shapes)
        if dtype in _BITS
    )


def _operations(computations: dict[str, list[str]], name: str, times: int) -> Iterator[Operation]:
    sizes: dict[str, int] = {}
    for line in computations[name]:
        if not (match := _OPERATION.match(line)):
            continue
        result, shapes, kind, rest = match.groups()
        sizes[result] = nbytes(shapes)
        read = set(re.findall(r"%[\w.\-]+", rest.split("), ")[0]))
        if kind == "while" and (body := re.search(r"body=(%[\w.\-]+)", line)):
            yield from _operations(computations, body[1], times * _trips(computations, line))
        elif kind not in FREE:
            yield Operation(kind, sizes[result] + sum(sizes.get(x, 0) for x in read), line, times)


def _trips(computations: dict[str, list[str]], loop: str) -> int:
    """Return how often a loop runs: XLA:GPU says so, XLA:TPU compares a counter with it."""
    if known := re.search(r"known_trip_count[^0-9]*(\d+)", loop):
        return int(known[1])
    condition = re.search(r"condition=(%[\w.\-]+)", loop)
    assert condition is not None
    text = "\n".join(computations[condition[1]])
    less = re.search(r"ROOT .* compare\(%[\w.\-]+, (%[\w.\-]+)\), direction=LT", text)
    count = less and re.search(rf"{re.escape(less[1])} = s32\[\]\S* constant\((\d+)\)", text)
    if not count:
        raise ValueError(f"a loop of unknown length: {condition[1]} is\n{text[:500]}")
    return int(count[1])


def _computations(program: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in program.splitlines():
        if match := re.match(r"^(ENTRY )?(%[\w.\-]+) .*\{$", line):
            lines = found["ENTRY" if match[1] else match[2]] = []
        else:
            lines.append(line)
    return found
