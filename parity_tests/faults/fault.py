"""A planted fault: one bug in one twin, and what the report must say about it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import pytest

from outlook_parity import Report

TWINS = ("torch", "jax")


@dataclass(frozen=True)
class Fault(ABC):
    """A bug that is planted in one twin; each family of faults adds how."""

    name: str
    twin: str  # "torch" or "jax"
    path: str | None  # the report's `first_divergence`
    cause: str  # words of the report's `cause`; "" if the kind cannot be told

    @abstractmethod
    def run(self, patch: pytest.MonkeyPatch) -> Report:
        """Build an honest pair, plant the fault in one twin, and verify both."""

    def __str__(self) -> str:
        return f"{self.twin}: {self.name}"


class Containing(str):
    """Equal to every text that contains this one, in capitals or not."""

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and self.lower() in other.lower()
