"""Read a pickle without executing anything: what it names must be in a table of stubs.

Python's own unpickler in its Python form: the one in C makes room for whatever index a memo names.
"""

import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

from outlook_common.text import printable
from outlook_common.weights.errors import WeightsError


class Record:
    """Stub of a class: what it was made with, and the state that it was given.

    Attributes:
        arguments: positional.
        state: usually a dictionary of attributes.
    """

    __slots__ = ("arguments", "state")
    kind = ""  # the name of the class
    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> "Record":
        """Keep the arguments, whatever they are."""
        made = object.__new__(cls)
        made.arguments, made.state = arguments, None
        return made

    def __init__(self, *arguments: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        """Keep the state, whatever it is."""
        self.state = state

    def field(self, name: str) -> Any:
        """Return an attribute; None if there is none."""
        return self.state.get(name) if isinstance(self.state, dict) else None


def record(name: str) -> type[Record]:
    """Return a stub of the class of this name."""
    return type("Record", (Record,), {"__slots__": (), "kind": name})


class Constant:
    """Stub of an object that is no class or function; `value` is what it stands for."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __setstate__(self, state: Any) -> None:
        """Refuse any change."""
        raise TypeError("a constant is given attributes")


def load(contents: bytes, stubs: Mapping[str, Any], persistent: Callable[[Any], Any] | None = None) -> Any:
    """Return what a pickle holds: stubs, and Python's numbers, strings, lists, tuples, dictionaries and sets.

    Args:
        contents: the pickle.
        stubs: "module.name" -> what stands for it.
        persistent: makes a stub of a persistent id; None refuses them.

    Raises:
        WeightsError: it names something else.
        Exception: it is damaged.
    """

    class Unpickler(pickle._Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (full := f"{module}.{name}") not in stubs:
                raise WeightsError(f"it refers to {printable(full)}, which is code and is not executed")
            return stubs[full]

        def persistent_load(self, pid: Any) -> Any:
            if persistent is None:
                raise WeightsError("it refers to something outside the pickle")
            return persistent(pid)

    return Unpickler(io.BytesIO(contents)).load()
