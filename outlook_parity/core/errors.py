"""Errors from user code, re-raised with model, module, shapes and line."""

import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

PACKAGE = Path(__file__).parents[1]  # frames below are the verifier's own

_MOST = 600  # characters of the first line of an error


@contextmanager
def user_code_errors(framework: str, shapes: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Re-raise errors from user code with the model, the module that ran, its input shapes and the line.

    What the verifier itself raises passes through.

    Raises:
        TypeError: in place of one.
        ValueError: in place of anything else.
    """
    try:
        yield
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        if isinstance(error, ValueError | TypeError) and _is_own(frames[-1].filename):
            raise
        inputs = ", ".join(f"{name} of shape {tuple(shape)}" for name, shape in shapes.items())
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        what = what if len(what) <= _MOST else f"{what[:_MOST]} …"
        inside = f" in {path}" if (path := running_module(error.__traceback__)) else ""
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"the {framework} model fails{inside} on {inputs}: {what}{_where(frames)}") from error


def _is_own(file: str) -> bool:
    """Whether the verifier itself raised an error, not a model that it could not call with these arguments."""
    return Path(file).is_relative_to(PACKAGE) and Path(file) != PACKAGE / "core" / "calls.py"


def _where(frames: Sequence[traceback.FrameSummary]) -> str:
    """Return the last line of user code in brackets; of an installed package's if there is no other, "" if none."""
    foreign = [frame for frame in frames if not frame.filename.startswith((str(PACKAGE), "<"))]
    users = [frame for frame in foreign if "site-packages" not in frame.filename]
    last = (users or foreign)[-1:]
    return "".join(f" ({frame.filename}, line {frame.lineno})" for frame in last)


def running_module(trace: TracebackType | None) -> str:
    """Return the path of the innermost module whose method was running; "" for the outermost, or if there is none."""
    owners = []
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if owner is not None and _is_module(owner):
            owners.append(owner)
        trace = trace.tb_next
    for owner in reversed(owners):
        for outer in owners:
            if path := _path_inside(outer, owner):
                return path
    return ""


# Without importing any of them: the module and the name of the base class of each kind.
_BASES = (("torch.nn", "Module"), ("flax.linen", "Module"), ("flax.nnx", "Module"), ("equinox", "Module"))


def _is_module(value: Any) -> bool:
    kinds = (getattr(sys.modules.get(home), name, None) for home, name in _BASES)
    return any(isinstance(kind, type) and isinstance(value, kind) for kind in kinds)


def _path_inside(outer: Any, inner: Any) -> str:
    """Return the path of a module inside another, "" if it is not there."""
    if hasattr(outer, "named_modules"):
        return next((path for path, module in outer.named_modules() if module is inner), "")
    if hasattr(inner, "scope"):
        return ".".join(getattr(inner, "path", ()) or ())
    if (nnx := sys.modules.get("flax.nnx")) is not None and isinstance(outer, nnx.Module):
        return next((".".join(map(str, path)) for path, part in nnx.iter_modules(outer) if part is inner), "")
    return _field_path(outer, inner)


def _field_path(outer: Any, inner: Any, most: int = 8) -> str:
    """Return the path of an object in the fields of another, at most `most` steps deep; "" if it is not there."""
    items: list[tuple[str, Any]]
    if isinstance(outer, list | tuple):
        items = [(str(index), item) for index, item in enumerate(outer)]
    elif isinstance(outer, dict):
        items = [(str(key), item) for key, item in outer.items()]
    else:
        items = list(vars(outer).items()) if _is_module(outer) else []
    for name, item in items:
        if item is inner:
            return name
    for name, item in items if most else ():
        if below := _field_path(item, inner, most - 1):
            return f"{name}.{below}"
    return ""
