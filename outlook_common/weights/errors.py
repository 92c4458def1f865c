"""The one error of loading, converting and writing weights."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from outlook_common.text import listed

Kind = Literal["missing", "unexpected", "misshapen", "duplicate", "mixed naming", "non-numeric"]

_LISTED = 20


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one tensor; `detail` is for people, with the numbers."""

    kind: Kind
    name: str
    detail: str


class WeightsError(ValueError):
    """Weights that cannot be used, with everything that is wrong with them at once; nothing was loaded or written.

    Attributes:
        message: what was attempted, in one line.
        problems: all of them, ordered by kind; empty if the file as a whole is at fault.
    """

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message, tuple(problems))
        self.message = message
        self.problems = tuple(problems)

    def names(self, kind: Kind) -> list[str]:
        """Return the names of the tensors with this kind of problem."""
        return [problem.name for problem in self.problems if problem.kind == kind]

    def __str__(self) -> str:
        lines = [self.message]
        for kind, count in Counter(problem.kind for problem in self.problems).items():
            lines.append(f"  {kind} ({count}):")
            details = (problem.detail for problem in self.problems if problem.kind == kind)
            lines.append("    " + listed(details, _LISTED, between="\n    "))
        return "\n".join(lines)
