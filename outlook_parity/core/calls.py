"""How models are called: by position or by keyword. Imports no framework."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Arguments of a model, by position or by keyword.
Arguments = Sequence[Any] | Mapping[str, Any]


def called(function: Callable[..., Any], arguments: Arguments, /, *first: Any, **more: Any) -> Any:
    """Return the result of `function`, called with `first`, the arguments and `more`."""
    if isinstance(arguments, Mapping):
        return function(*first, **arguments, **more)
    return function(*first, *arguments, **more)


def argument_names(function: Callable[..., Any]) -> frozenset[str] | None:
    """Return the names of the arguments that can be given by keyword; None if they are unknown."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return frozenset(parameter.name for parameter in parameters if parameter.kind in kinds)


def accept_keywords(keywords: Sequence[str], *known: frozenset[str] | None) -> bool:
    """Whether all keywords are names of arguments of every model."""
    return bool(keywords) and all(names is not None and names.issuperset(keywords) for names in known)
