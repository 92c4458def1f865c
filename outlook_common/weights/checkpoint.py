"""What somebody saved, as a flat list of names: wrappers taken off, a part of it chosen."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from outlook_common.text import listed
from outlook_common.weights.errors import WeightsError
from outlook_common.weights.formats.registry import Contents, PathLike, open_file
from outlook_common.weights.io import limits
from outlook_common.weights.locate import weights_and_config

Source = PathLike | Mapping[Any, Any]

# What timm, and scripts like DeiT's, call averaged weights.
_AVERAGED = ("state_dict_ema", "model_ema")
_PREFIX_STEPS = 12
# Keys whose value is the checkpoint proper; what lies beside them (optimizer, epoch) is not weights.
_WRAPPERS = ("state_dict", "model")
# What every name begins with, if any does, in any order: DataParallel, torch.compile, Lightning, and the collections of
# Flax Linen.
_COMMON = (("module.",), ("_orig_mod.",), ("model.",), ("params.", "batch_stats."))
_PARAMETERS, _STATISTICS = re.compile(r"(?<![^.])params\."), re.compile(r"((?:.+\.)?)batch_stats\.(.+)")
# What NNX keeps in the modules of this package beside their weights: random streams, rates of stochastic depth.
_NOT_WEIGHTS = re.compile(r"(?:.+\.)?(?:rngs\.(?:count|key)|drop_path[12]\.rate)")


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
        none_anywhere: names of every part that are known to be no weights, a model's random streams and rates of
            stochastic depth; they are in no items.
    """

    label: str
    prefix: str
    items: tuple[tuple[str, Any], ...]
    everything: tuple[tuple[str, Any], ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    file: Path | None = None
    none_anywhere: tuple[str, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        """The names in the chosen part."""
        return frozenset(name for name, _ in self.items)

    @property
    def not_weights(self) -> tuple[str, ...]:
        """The names in the chosen part that are known to be no weights."""
        start = f"{self.prefix}." if self.prefix else ""
        return tuple(name[len(start) :] for name in self.none_anywhere if name.startswith(start))

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
    `state_dict_ema` or `model_ema` are opened; `module.` and the like are stripped if every name begins so. What Flax
    Linen has in `batch_stats` beside `params` is found below `params`.

    Args:
        source: a path, a Hub id, a state_dict, an NNX state, a dict of parameters, flat or nested.
        prefix: keeps only the names below it, without it.
        use_ema: take the averaged weights.

    Raises:
        WeightsError: the file cannot be read, or has no averaged weights where they are asked for, or has only those.
        OSError: the file cannot be opened, or cannot be had from the Hub (`HubError`).
        ImportError: reading the file needs PyTorch, which is not installed.
        TypeError: the source is something else, a model for instance; the message says what to give instead.
    """
    prefix = prefix.replace("/", ".").strip(".")
    if isinstance(source, Mapping):
        label, file, contents = "the given weights", None, Contents(source)
    elif not isinstance(source, str | os.PathLike):
        raise TypeError(f"{type(source).__name__} is no source of weights: {_instead_of(source)}")
    else:
        label, file = str(source), weights_and_config(source)[0]
        contents = open_file(file)
    flat = _joined(list(_flat(_unwrapped(contents.values, label, use_ema=use_ema), label)))
    flat = _without_common(flat, prefix)
    items = tuple(item for item in flat if not _NOT_WEIGHTS.fullmatch(item[0]))
    none = tuple(name for name, _ in flat if _NOT_WEIGHTS.fullmatch(name))
    return Checkpoint(label, "", items, items, contents.metadata, file, none).below(prefix)


def _instead_of(source: Any) -> str:
    if hasattr(source, "state_dict"):
        return "of a model give model.state_dict()"
    if any(kind.__module__.startswith("flax.nnx") for kind in type(source).__mro__):
        return "of a model give nnx.state(model)"
    return "give a path, a Hub id or a mapping of arrays"


def _unwrapped(contents: Mapping[Any, Any], label: str, *, use_ema: bool) -> Mapping[Any, Any]:
    averaged = _first_mapping(contents, _AVERAGED)
    if use_ema:
        if averaged is None:
            names = " or ".join(map(repr, _AVERAGED))
            raise WeightsError(f"{label}: use_ema=True, but it has no {names}; at the top it has {listed(contents)}")
        contents = contents[averaged]
    while wrapper := _first_mapping(contents, _WRAPPERS):
        contents = contents[wrapper]
    if (averaged := _first_mapping(contents, _AVERAGED)) is not None:
        raise WeightsError(f"{label}: it has only averaged weights, {averaged!r}; use_ema=True (--use-ema) takes them")
    return contents


def _first_mapping(contents: Mapping[Any, Any], keys: Iterable[str]) -> str | None:
    return next((key for key in keys if isinstance(contents.get(key), Mapping)), None)


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


def _without_common(items: list[tuple[str, Any]], prefix: str) -> list[tuple[str, Any]]:
    while starts := next((starts for starts in _COMMON if all(name.startswith(starts) for name, _ in items)), None):
        if not items or f"{prefix}.".startswith(starts):
            break  # somebody counts on it
        lengths = {start: len(start) for start in starts}
        items = [
            (name[next(size for start, size in lengths.items() if name.startswith(start)) :], value)
            for name, value in items
        ]
    return items


def _joined(items: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Put BatchNorm's statistics, which Flax Linen keeps in a collection of their own, among the parameters."""
    above_parameters = {name[: found.start()] for name, _ in items for found in _PARAMETERS.finditer(name)}

    def joined(name: str) -> str:
        found = _STATISTICS.fullmatch(name)
        return f"{found[1]}params.{found[2]}" if found and found[1] in above_parameters else name

    return [(joined(name), value) for name, value in items]
