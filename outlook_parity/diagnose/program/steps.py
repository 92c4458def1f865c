"""The operations of a module as words, and where those of the twins first differ. Imports no framework."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from outlook_parity.core.program import PARAMETER, Node, through
from outlook_parity.diagnose.program.activations import Regions, activations, linear
from outlook_parity.diagnose.program.attention import scale_of, softmaxes


@dataclass(frozen=True)
class Step:
    """One operation in words.

    Attributes:
        verb: as in "applies ReLU".
        number: that it is done with, None if with none.
    """

    verb: str
    number: float | None = None

    def __str__(self) -> str:
        return self.verb if self.number is None else f"{self.verb} {self.number:.6g}"


MULTIPLY, ADD = "multiplies by", "adds"

_VERBS = {
    "dot": "multiplies matrices",
    "conv": "convolves",
    "norm": "normalises",
    "sort": "sorts",
    "cumsum": "sums up along an axis",
}


def steps_of(nodes: Sequence[Node]) -> list[Step]:
    """Return the operations of a module that both frameworks have in common, in order."""
    regions = Regions(nodes)
    named, ends = activations(regions), set(regions.ends())
    closed = {end: logits for logits, end in softmaxes(nodes)}
    # PyTorch's attention multiplies queries and keys by the root of the scale: attributes compare the whole.
    scaled = any(scale_of(logits) is not None for logits in closed.values())
    found: list[Step] = []
    for node in nodes:
        if node.constant:
            continue
        if node in closed:
            found.append(Step("applies softmax"))
        elif node in named:
            found.append(Step(f"applies {named[node]}"))
        elif node in ends:
            values = regions.evaluate(node)
            line = linear(values)
            if line is not None:
                found += [
                    Step(verb, float(f"{number:.5g}"))
                    for verb, number, neutral in ((MULTIPLY, abs(line[0]), 1.0), (ADD, line[1], 0.0))
                    if abs(number - neutral) > 1e-6 and not (scaled and verb == MULTIPLY)
                ]
        elif node in regions.roots:
            continue
        elif node.kind in ("add", "mul") and node.floating and (of := _parameter(node)):
            found.append(Step(f"{'adds' if node.kind == 'add' else 'multiplies by'} the parameter of shape {of}"))
        elif node.kind in _VERBS:
            found.append(Step(_VERBS[node.kind]))
    return found


def _parameter(node: Node) -> str:
    """Return the shape of the parameter that is added or multiplied by, "" if none is."""
    for operand in map(through, node.operands):
        if operand.kind == PARAMETER:
            return str(tuple(sorted(length for length in operand.shape if length != 1)))
    return ""


def first_difference(torch: Sequence[Node], jax: Sequence[Node]) -> str | None:
    """Return in words the first operation that one twin alone has, None if both have the same ones."""
    steps = {"torch": steps_of(torch), "jax": steps_of(jax)}
    counts = {twin: Counter(found) for twin, found in steps.items()}
    extra = {
        "torch": counts["torch"] - counts["jax"],
        "jax": counts["jax"] - counts["torch"],
    }
    firsts = {twin: next((step for step in steps[twin] if extra[twin][step]), None) for twin in steps}
    one, other = firsts["torch"], firsts["jax"]
    if one is None and other is None:
        return _other_order(steps["torch"], steps["jax"])
    if one is not None and other is not None and (one.number is None) == (other.number is None):
        return f"{other} in jax, {one} in torch"
    twin, step = ("jax", other) if other is not None else ("torch", one)
    rest = {"torch": "jax", "jax": "torch"}[twin]
    done = "by nothing" if step is not None and step.verb == MULTIPLY else "which is not done"
    return f"{step} in {twin}, {done} in {rest}"


def _other_order(torch: Sequence[Step], jax: Sequence[Step]) -> str | None:
    for one, other in zip(torch, jax, strict=True):
        if one != other:
            return f"the same operations in another order: first {other} in jax, {one} in torch"
    return None
