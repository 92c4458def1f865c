"""Attributes of modules (eps, momentum, padding, …) in words shared by both frameworks. Imports no framework.

`backends/torch/attributes.py` and `backends/jax/attributes.py` read them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from outlook_parity.core.resizing import INTERPOLATION, SCALE

# Path of a module -> attribute -> value.
Attributes = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Difference:
    """An attribute that differs between the twins."""

    path: str
    kind: str  # of the module, as PyTorch calls it
    attribute: str
    torch: Any
    jax: Any

    def __str__(self) -> str:
        values = f"{_word(self.jax)} in jax, {_word(self.torch)} in torch"
        return f"{self.kind} {self.attribute} {values}, at {self.path or '(model)'}"


# Attributes that change no number in float64 and in the modes that the verifier sets itself. The precision is that of
# products of float32: the verifier pins both frameworks, but a module may set its own. The variance of a norm in one
# pass, as mean of squares less square of the mean, loses digits that two passes keep.
NO_EFFECT_IN_FLOAT64 = ("mode", "precision", "variance")

# Differs by Flax's default: reported only where it is the cause.
ONLY_AS_CAUSE = ("variance",)

# By whether the variance is computed in one pass.
VARIANCE = {True: "in one pass", False: "in two passes"}

# Attributes of functions, which a module calls or has a module for.
FUNCTIONAL = ("GELU", "pool divisor", INTERPOLATION, SCALE)


def differences(torch: Attributes, jax: Attributes, kinds: Mapping[str, str]) -> list[Difference]:
    """Return the attributes that differ, of modules and attributes that both twins have.

    Those of functions, of an activation that is a module in one twin alone say, count for the module around it.
    """
    shared = torch.keys() & jax.keys()
    torch_merged, jax_merged = _merged(torch, shared), _merged(jax, shared)
    return [
        Difference(path, kinds.get(path, "module"), name, torch_merged[path][name], jax_merged[path][name])
        for path in torch
        if path in shared
        for name in torch_merged[path].keys() & jax_merged[path].keys()
        if not same_value(torch_merged[path][name], jax_merged[path][name])
    ]


def _merged(attributes: Attributes, shared: set[str]) -> Attributes:
    """Return the attributes of the shared modules, with those of functions in modules inside that are not shared."""
    merged: Attributes = {path: dict(attributes[path]) for path in attributes if path in shared}
    for path, own in attributes.items():
        outer = path
        while outer and outer not in shared:
            outer = outer.rpartition(".")[0]
        if outer != path and outer in merged:
            for name, value in own.items():
                if name in FUNCTIONAL:
                    merged[outer].setdefault(name, value)
    return merged


def same_value(one: Any, other: Any) -> bool:
    """Whether two values of an attribute are the same."""
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
