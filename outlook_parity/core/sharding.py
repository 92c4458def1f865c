"""Over which devices the JAX twin ran, as the report says it. Imports no framework."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Rules for a twin on one device -> what they do with weights; inputs are split along the batch by either.
RULES = {
    "data": "every device has all weights",
    "fsdp": "weights are split: this package's by its table, others along the longest axis that the devices divide",
}
AS_GIVEN = "as given"


@dataclass(frozen=True)
class ShardingRequest:
    """What is asked for.

    Attributes:
        devices: over how many devices the rules spread the twin; None runs it as it is given.
        rules: a key of `RULES`.
        inputs: as the user gave them, by name: they may be sharded.
    """

    devices: int | None = None
    rules: str = "data"
    inputs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sharding:
    """Over which devices the JAX twin ran.

    Attributes:
        mesh: axis -> how many devices along it.
        axis_types: axis -> "auto" or "explicit".
        rules: "as given", "data" or "fsdp".
        weights: how many parameters and buffers the twin has.
        split: how many of them no device had whole.
        inputs: input -> its partition spec.
    """

    mesh: Mapping[str, int]
    axis_types: Mapping[str, str]
    rules: str
    weights: int
    split: int
    inputs: Mapping[str, str]

    def __str__(self) -> str:
        count = 1
        for size in self.mesh.values():
            count *= size
        axes = ", ".join(f"{name}={size}" for name, size in self.mesh.items())
        inputs = ", ".join(f"{name} {spec}" for name, spec in self.inputs.items())
        return (
            f"the JAX twin ran on {count} devices, mesh ({axes}), {self.rules}: {self.split} of {self.weights} weights "
            f"split; {inputs}"
        )
