"""How an op picks among its implementations; one rule for both twins."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outlook_common.text import closest

ImplementationRequest = str | Sequence[str] | None


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    `refusal` gets the arguments of `run` and returns why they cannot be computed this way, or None if they can.
    `drawback` likewise returns why another way is better for them; then only who asks by name gets this one.
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
    """Return the `run` of the first implementation that can take these arguments.

    `requested` is a name, a sequence of names to try in order, or None for all of `implementations`, which are
    ordered from fastest to slowest, without those that have a drawback.

    Raises:
        ValueError: a name is unknown, or the sequence is empty.
        NotImplementedError: the one name that was asked for cannot run; the message says why.
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
    """Return the names to try in order; raise a ValueError if one is unknown, or if there is none."""
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
