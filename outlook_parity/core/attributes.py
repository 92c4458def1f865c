"""What models say about themselves, eps, momentum, paddings, in common words, and where twins say different things.

Imports no framework: `torch_semantics` and `jax_semantics` read the models.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Path of a module -> what it says: fact -> value, in words that both twins share.
Facts = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Difference:
    """One fact that the twins say differently."""

    path: str
    kind: str  # of the module, as PyTorch calls it
    fact: str
    torch: Any
    jax: Any

    def __str__(self) -> str:
        values = f"{_word(self.jax)} in jax, {_word(self.torch)} in torch"
        return f"{self.kind} {self.fact} {values}, at {self.path or '(model)'}"


# Facts that change no number in float64 and in the modes that the verifier sets itself. The precision is that of
# products of float32: as the verifier pins both frameworks, unless a module says otherwise. The variance of a norm, as
# mean of squares less square of the mean, takes one pass, and loses digits that two passes keep.
HARMLESS = ("mode", "precision", "variance")

# As Flax has it by default: said only where it is the cause.
QUIET = ("variance",)

PASSES = {True: "in one pass", False: "in two passes"}


def differences(torch: Facts, jax: Facts, kinds: Mapping[str, str]) -> list[Difference]:
    """Return what the twins say differently about the modules that both have, facts that only one tells left out.

    What a module says that only one twin has, an activation say, counts for the one around it.
    """
    shared = torch.keys() & jax.keys()
    merged = [_merged(facts, shared) for facts in (torch, jax)]
    return [
        Difference(path, kinds.get(path, "module"), fact, merged[0][path][fact], merged[1][path][fact])
        for path in torch
        if path in shared
        for fact in merged[0][path].keys() & merged[1][path].keys()
        if not _same(merged[0][path][fact], merged[1][path][fact])
    ]


def _merged(facts: Facts, shared: set[str]) -> Facts:
    merged: Facts = {path: dict(facts[path]) for path in facts if path in shared}
    for path, own in facts.items():
        outer = path
        while outer and outer not in shared:
            outer = outer.rpartition(".")[0]
        if outer != path and outer in merged:
            for fact, value in own.items():
                if fact in FUNCTIONAL:
                    merged[outer].setdefault(fact, value)
    return merged


# Of modules with a configuration: fact -> its field.
OWN_ATTRIBUTES = {"scale": "qk_scale", "heads": "num_heads", "window": "kernel_size", "window stride": "stride"}

# Facts about what a module's code does, wherever in it.
FUNCTIONAL = ("GELU", "pool divisor", "interpolation")


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= 1e-6 * max(abs(one), abs(other))  # 1 - 0.9 is not 0.1
    return bool(one == other)


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else f"{value}"


def pairs_of(value: Any, axes: int) -> tuple[tuple[int, int], ...] | str:
    """Return a padding as (before, after) per axis, or the word for it."""
    if isinstance(value, str):
        return value.upper()
    if isinstance(value, int):
        value = [value] * axes
    return tuple((item, item) if isinstance(item, int) else (int(item[0]), int(item[1])) for item in value)


def ints_of(value: Any, axes: int) -> tuple[int, ...]:
    """Return one int per axis; None stands for 1."""
    if value is None:
        value = 1
    return (value,) * axes if isinstance(value, int) else tuple(int(item) for item in value)
