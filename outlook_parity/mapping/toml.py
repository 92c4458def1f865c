"""Entries of a map as TOML, and correspondence that was found as a map. Imports no framework."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from outlook_common.text import closest, listed
from outlook_parity.core.layout import Axes
from outlook_parity.mapping.entries import Entry, WeightEntry, entry_of
from outlook_parity.mapping.names import Names, WeightName

# Keys of a weight's table -> what they must be.
KEYS = {
    "name": "a string",
    "split": "[k, n] or [k, n, axis]",
    "cuts": "a list of [axis, index] or [axis, start, stop]",
    "permute": "a permutation of 0, 1, …, as in [1, 0]",
    "reshape": "a list of lengths",
    "flip": "true or false",
    "stack": "a number of layers",
    "into": "a list of [axis, index] or [axis, start, stop]",
}


def entry_from_toml(value: Any, what: str) -> Entry:
    """Return a weight's entry: of a string, a table, or a list of tables.

    Raises:
        ValueError: it has other keys, or values of other types; `what` says of which weight.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        return [_entry(table, what) for table in value]
    return _entry(value, what)


def _entry(table: Any, what: str) -> WeightEntry:
    if not isinstance(table, dict):
        raise ValueError(f"{what} must be a string, a table with name, or a list of such tables; got {table!r}")
    for key in table:
        if key not in KEYS:
            close = closest(key, KEYS)
            hint = f"; did you mean {close!r}?" if close else ""
            raise ValueError(f"{what}: {key!r} is none of {', '.join(KEYS)}{hint}")
    if "name" not in table:
        raise ValueError(f"{what}: the table needs name, PyTorch's name of the weight")
    for key, value in table.items():
        if not _valid(key, value):
            raise ValueError(f"{what}: {key} must be {KEYS[key]}; got {value!r}")
    tuples = {key: tuple(table[key]) for key in ("split", "permute", "reshape") if key in table}
    cuts = {key: tuple(map(tuple, table[key])) for key in ("cuts", "into") if key in table}
    return WeightEntry(**{**table, **tuples, **cuts})


def _valid(key: str, value: Any) -> bool:
    match key:
        case "name":
            return isinstance(value, str)
        case "flip":
            return isinstance(value, bool)
        case "stack":
            return _is_integer(value) and value > 0
        case "permute":
            return _integers(value) and sorted(value) == list(range(len(value)))
        case "split":
            return _integers(value) and len(value) in (2, 3)
        case "cuts" | "into":
            return isinstance(value, list) and all(_integers(cut) and len(cut) in (2, 3) for cut in value)
    return _integers(value)


def _is_integer(value: Any) -> bool:
    return type(value) is int and value >= 0  # no booleans


def _integers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_integer, value))


def write_name_map(path: Path, names: Names, torch_axes: Axes | Sequence[Axes | None] | None = None) -> None:
    """Write what corresponds as a map that `read_name_map` reads.

    Args:
        path: the file.
        names: what corresponds; weights without counterpart are comments, with their candidates.
        torch_axes: of the map that was given, see `NameMap`.

    Raises:
        OSError: it cannot be written.
    """
    path.write_text(name_map_text(names, torch_axes))


def name_map_text(names: Names, torch_axes: Axes | Sequence[Axes | None] | None = None) -> str:
    """Return what `write_name_map` writes."""
    lines: list[str] = []
    if torch_axes is not None:
        lines.append(f"torch_axes = {json.dumps([list(a) if isinstance(a, tuple) else a or [] for a in torch_axes])}")
    if names.found.modules:
        lines += ["[modules]", *(f"{_text(path)} = {_text(torch)}" for path, torch in names.found.modules.items())]
    lines.append("[weights]")
    alone = names.found.candidates
    for flax, pieces in names.pieces.items():
        if flax not in alone and not flax.startswith("(no counterpart of "):
            lines.append(f"{_text(flax)} = {_value(pieces)}")
    for flax, candidates in alone.items():
        lines.append(f"# no counterpart: {_text(flax)}; may be: {listed(candidates) or 'none of the same shape'}")
    lines += [f"# no counterpart: {_text(name)} of torch" for name in names.found.left if name in names.expected]
    return "\n".join(lines) + "\n"


def _value(pieces: Sequence[WeightName]) -> str:
    tables = [_table(entry_of(weight)) for weight in pieces]
    return tables[0] if len(tables) == 1 else f"[{', '.join(tables)}]"


def _table(entry: WeightEntry) -> str:
    given: Mapping[str, Any] = {field.name: getattr(entry, field.name) for field in fields(entry)}
    items = (f"{key} = {_text(value)}" for key, value in given.items() if value not in (None, (), False))
    return f"{{ {', '.join(items)} }}"


def _text(value: Any) -> str:
    """Return a value as TOML has it, which is as JSON for these."""
    if isinstance(value, Iterable) and not isinstance(value, str):
        return json.dumps([list(one) if isinstance(one, tuple) else one for one in value])
    return json.dumps(value)
