"""Select an implementation of an op, by one rule for both twins."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outlook_common.text import closest

ImplementationRequest = str | Sequence[str] | None


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
        run: the op.
        refusal: same arguments -> why it cannot run with them; None if it can.
        drawback: same arguments -> why another implementation is better for them, so that this one is used only on
            request by name; None if there is no reason.
    """

    run: Callable[..., Any]
    refusal: Callable[..., str | None]
    drawback: Callable[..., str | None] = lambda *args, **kwargs: None


def choose(
    requested: ImplementationRequest,
    implementations: Mapping[str, Implementation],
    *args: Any,
    **kwargs: Any,
) -> Callable[..., Any]:
    """Return the `run` of the first implementation that can run with these arguments.

    `requested` is a name, a sequence of names to try in order, or None for all of `implementations` without a drawback,
    which are ordered from fastest to slowest.

    Raises:
        ValueError: a name is unknown, or the sequence is empty.
        NotImplementedError: the one requested name cannot run; the message says why.
        ExceptionGroup: none of several can run; one NotImplementedError each.
    """
    names = check_implementation(requested, implementations)
    refusals = []
    for name in names:
        reason = implementations[name].refusal(*args, **kwargs)
        if requested is None:
            reason = reason or implementations[name].drawback(*args, **kwargs)
        if reason is None:
            return implementations[name].run
        refusals.append(NotImplementedError(f"implementation {name!r} cannot run here: {reason}"))
    if len(refusals) == 1:
        raise refusals[0]
    raise ExceptionGroup("no requested implementation can run here", refusals)


def check_implementation(
    requested: ImplementationRequest, implementations: Mapping[str, Implementation]
) -> Sequence[str]:
    """Return the names to try, in order; raise a ValueError if there is none, or one is unknown."""
    names = tuple(implementations) if requested is None else (requested,) if isinstance(requested, str) else requested
    if not names:
        raise ValueError(f"implementation is an empty sequence; known: {_listed(implementations)}")
    for name in names:
        if name not in implementations:
            close = closest(name, implementations)
            hint = f"; did you mean {close!r}?" if close else ""
            raise ValueError(f"unknown implementation {name!r}; known: {_listed(implementations)}{hint}")
    return names


def _listed(implementations: Mapping[str, Implementation]) -> str:
    return ", ".join(repr(name) for name in implementations)
