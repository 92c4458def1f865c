"""What somebody saved, as a flat list of names: wrappers taken off, a part of it chosen."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from outlook_common.weights import limits
from outlook_common.weights.errors import WeightsError
from outlook_common.weights.files import Contents, PathLike, open_file
from outlook_common.weights.shown import listed
from outlook_common.weights.source import weights_and_config

Source = PathLike | Mapping[Any, Any]

EMA = "state_dict_ema"
_PREFIX_STEPS = 12
# Keys whose value is the checkpoint proper; what lies beside them (optimizer, epoch) is not weights.
_WRAPPERS = ("state_dict", "model")
# What every name begins with, if any does: DataParallel, torch.compile, and the collections of Flax Linen.
_COMMON = (("module.",), ("_orig_mod.",), ("params.", "batch_stats."))


@dataclass(frozen=True)
class Checkpoint:
    """Named values, as found; nothing is known of what they are.

    Attributes:
        label: what it was read from, for messages.
        prefix: which part was chosen; "" for all.
        items: (name, value) of that part, without the prefix; a name may come twice.
        everything: likewise of every part, with their prefixes.
        metadata: what the file says of itself.
        file: where it was read from, None for a mapping.
    """

    label: str
    prefix: str
    items: tuple[tuple[str, Any], ...]
    everything: tuple[tuple[str, Any], ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    file: Path | None = None

    @property
    def names(self) -> frozenset[str]:
        """The names in the chosen part."""
        return frozenset(name for name, _ in self.items)

    def below(self, prefix: str) -> "Checkpoint":
        """Return the part below a prefix, of everything."""
        start = f"{prefix}." if prefix else ""
        part = tuple((name[len(start) :], value) for name, value in self.everything if name.startswith(start))
        return replace(self, prefix=prefix, items=part)

    def prefixes_where(self, holds: Callable[[Mapping[str, Any]], bool]) -> list[str]:
        """Return the prefixes for which `holds` is true of what lies below them, {name without the prefix: value}.

        Prefixes of more than `_PREFIX_STEPS` steps are not looked at.
        """
        parts: dict[str, dict[str, Any]] = {}
        for name, value in self.everything:
            steps = name.split(".")
            for depth in range(1, min(len(steps), _PREFIX_STEPS + 1)):
                parts.setdefault(".".join(steps[:depth]), {})[".".join(steps[depth:])] = value
        return [prefix for prefix, part in parts.items() if holds(part)]


def open_checkpoint(source: Source, *, prefix: str = "", use_ema: bool = False) -> Checkpoint:
    """Read a path or what a Hub id names, or take a mapping, and strip what wraps the weights.

    Nested mappings and paths with "/" become names with dots. The wrappers `state_dict`, `model` and, if `use_ema`,
    `state_dict_ema` are opened; `module.` and the like are stripped if every name begins so.

    Args:
        source: a path, a Hub id, a state_dict, an NNX state, a dict of parameters, flat or nested.
        prefix: keeps only the names below it, without it.
        use_ema: take the averaged weights.

    Raises:
        WeightsError: the file cannot be read, or has no averaged weights where they are asked for, or has only those.
        OSError: the file cannot be opened, or cannot be had from the Hub (`HubError`).
        ImportError: reading the file needs PyTorch, which is not installed.
    """
    if isinstance(source, Mapping):
        label, file, contents = "the given weights", None, Contents(source)
    else:
        label, file = str(source), weights_and_config(source)[0]
        contents = open_file(file)
    items = tuple(_without_common(list(_flat(_unwrapped(contents.values, label, use_ema=use_ema), label))))
    checkpoint = Checkpoint(label, "", items, items, contents.metadata, file)
    return checkpoint.below(prefix.replace("/", ".").strip("."))


def _unwrapped(contents: Mapping[Any, Any], label: str, *, use_ema: bool) -> Mapping[Any, Any]:
    if use_ema:
        if not isinstance(contents.get(EMA), Mapping):
            raise WeightsError(f"{label}: use_ema=True, but it has no {EMA!r}; at the top it has {listed(contents)}")
        contents = contents[EMA]
    while wrapper := next((key for key in _WRAPPERS if isinstance(contents.get(key), Mapping)), None):
        contents = contents[wrapper]
    if isinstance(contents.get(EMA), Mapping):
        raise WeightsError(f"{label}: it has only averaged weights, {EMA!r}; use_ema=True (--use-ema) takes them")
    return contents


def _flat(contents: Mapping[Any, Any], label: str, above: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    if depth > limits.DEPTH:
        raise WeightsError(f"{label}: mappings nest more than {limits.DEPTH} deep")
    for key, value in contents.items():
        steps = key if isinstance(key, tuple) else (key,)  # `nnx.to_flat_state` has tuples for keys
        name = above + ".".join(str(step) for step in steps).replace("/", ".")
        if isinstance(value, Mapping):
            yield from _flat(value, label, f"{name}.", depth + 1)
        else:
            yield name, value


def _without_common(items: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    for starts in _COMMON:
        while items and all(name.startswith(starts) for name, _ in items):
            lengths = {start: len(start) for start in starts}
            items = [
                (name[next(size for start, size in lengths.items() if name.startswith(start)) :], value)
                for name, value in items
            ]
    return items
