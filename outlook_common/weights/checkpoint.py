"""A checkpoint flattened to `(name, value)` pairs, without wrappers."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from outlook_common.text import listed
from outlook_common.weights.described import pretrained_cfg_in, read_model_config
from outlook_common.weights.errors import WeightsError
from outlook_common.weights.formats.base import Contents, PathLike
from outlook_common.weights.formats.registry import open_file
from outlook_common.weights.io import limits
from outlook_common.weights.locate import weights_and_config

Source = PathLike | Mapping[Any, Any]
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

# Averaged weights, as timm, scripts like DeiT's and the recipes of `examples/imagenet` call them.
AVERAGED = ("state_dict_ema", "model_ema", "average")
# Longer prefixes are not searched.
_PREFIX_STEPS = 12
# Keys whose value holds the weights; their siblings (optimizer, epoch) are ignored.
_WRAPPERS = ("state_dict", "model", "model_state_dict")
# Steps of names that wrappers of modules add, removed anywhere: DataParallel and averaged models, torch.compile,
# Opacus, FSDP of PyTorch and of FairScale, activation checkpointing.
_WRAPPING_STEPS = {
    "module",
    "_orig_mod",
    "_module",
    "_fsdp_wrapped_module",
    "_fpw_module",
    "_checkpoint_wrapped_module",
}
# Starts of names, removed if all arrays' names have one of them, in any order: Lightning, and the collections of Flax
# Linen.
_COMMON = (("model.",), ("params.", "batch_stats."))
_PARAMETERS, _STATISTICS = re.compile(r"(?<![^.])params\."), re.compile(r"((?:.+\.)?)batch_stats\.(.+)")
# Variables that are no weights: random streams and rates of stochastic depth of this package's NNX modules, and the
# count of models in PyTorch's AveragedModel.
_NOT_WEIGHTS = re.compile(r"(?:.+\.)?(?:rngs\.(?:count|key)|drop_path[12]\.rate|n_averaged)")


@dataclass(frozen=True)
class Checkpoint:
    """Named values of a file or mapping, before they are matched to a model.

    Attributes:
        label: the source, for messages.
        prefix: the selected part; "" for all.
        items: (name, value) of that part, without the prefix; names may repeat.
        everything: (name, value) of every part, with prefixes.
        metadata: of the file.
        described: what the `config.json` beside the file holds; empty if there is none.
        file: the file or folder; None for a mapping.
        excluded: full names of values known to be no weights: random streams, rates of stochastic depth, `n_averaged`.
    """

    label: str
    prefix: str
    items: tuple[tuple[str, Any], ...]
    everything: tuple[tuple[str, Any], ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    described: Mapping[str, Any] = field(default_factory=dict)
    file: Path | None = None
    excluded: tuple[str, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        """The names in the selected part."""
        return frozenset(name for name, _ in self.items)

    @property
    def shapes(self) -> dict[str, Shape]:
        """{name: shape} of the selected part; () for a value that is no array."""
        return {name: _shape(value) for name, value in self.items}

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """How images are prepared, as timm says it: from `config.json`, else from the metadata."""
        return pretrained_cfg_in(self.described, self.metadata)

    @property
    def where(self) -> str:
        """The source and the prefix, for messages."""
        return self.label + (f", prefix {self.prefix!r}" if self.prefix else "")

    @property
    def not_weights(self) -> tuple[str, ...]:
        """The names in the selected part of values known to be no weights."""
        start = f"{self.prefix}." if self.prefix else ""
        return tuple(name[len(start) :] for name in self.excluded if name.startswith(start))

    def below(self, prefix: str) -> "Checkpoint":
        """Return this checkpoint with the part below another prefix selected."""
        start = f"{prefix}." if prefix else ""
        part = tuple((name[len(start) :], value) for name, value in self.everything if name.startswith(start))
        return replace(self, prefix=prefix, items=part)

    def prefixes_where(self, predicate: Callable[[Shapes], bool]) -> list[str]:
        """Return the prefixes whose part, {name without the prefix: shape}, satisfies a predicate.

        Only prefixes of up to `_PREFIX_STEPS` steps are searched.
        """
        parts: dict[str, dict[str, Shape]] = {}
        for name, value in self.everything:
            steps, shape = name.split("."), _shape(value)
            for depth in range(1, min(len(steps), _PREFIX_STEPS + 1)):
                parts.setdefault(".".join(steps[:depth]), {})[".".join(steps[depth:])] = shape
        return [prefix for prefix, part in parts.items() if predicate(part)]


def _shape(value: Any) -> Shape:
    return tuple(getattr(value, "shape", ()))


def open_checkpoint(
    source: Source, *, prefix: str = "", use_ema: bool = False, wrapped: bool = False, **access: Any
) -> Checkpoint:
    """Open a checkpoint and remove its wrappers; numbers are read later where the format allows.

    Nested mappings and paths with "/" become names with dots. The wrappers `state_dict`, `model`, `model_state_dict`
    and, if `use_ema`, `state_dict_ema`, `model_ema` or `average` are opened. Steps that wrappers of modules add
    (`module`, `_orig_mod`, …) are removed anywhere in a name, if names stay unique; `model.` and `params.` if every
    array's name starts so. Flax Linen's `batch_stats` beside `params` are moved below `params`.

    Args:
        source: a path, a Hub id, the name of a released variant, a state_dict, an NNX state, or a flat or nested dict
            of arrays.
        prefix: select the names below it, and remove it from them.
        use_ema: take the averaged weights.
        wrapped: leave the wrappers, with what is beside the weights in them.
        **access: arguments of `outlook_common.hub.fetch` for a Hub id.

    Raises:
        WeightsError: the file or the `config.json` beside it cannot be read, `use_ema` finds no averaged weights, or
            there are only averaged ones.
        OSError: the file cannot be opened or downloaded (`HubError`).
        ImportError: the format needs a framework that is not installed.
        TypeError: the source is of another type, such as a model; the message says what to pass instead.
    """
    prefix = prefix.replace("/", ".").strip(".")
    described: Mapping[str, Any] = {}
    if isinstance(source, Mapping):
        label, file, contents = "the given weights", None, Contents(source)
    elif not isinstance(source, str | os.PathLike):
        raise TypeError(f"{type(source).__name__} is not a source of weights: {_instead_of(source)}")
    else:
        label = str(source)
        file, model_config = weights_and_config(source, **access)
        described = {} if model_config is None else read_model_config(model_config, label)
        contents = open_file(file)
    values = contents.values if wrapped else _unwrapped(contents.values, label, use_ema=use_ema)
    flat, prefix = _without_wrapping_steps(_with_statistics_in_params(list(_flat(values, label))), prefix)
    flat = flat if wrapped else _without_common_start(flat, prefix)
    items = tuple(item for item in flat if not _NOT_WEIGHTS.fullmatch(item[0]))
    excluded = tuple(name for name, _ in flat if _NOT_WEIGHTS.fullmatch(name))
    return Checkpoint(label, "", items, items, contents.metadata, described, file, excluded).below(prefix)


def _instead_of(source: Any) -> str:
    if hasattr(source, "state_dict"):
        return "for a model pass model.state_dict()"
    if any(kind.__module__.startswith("flax.nnx") for kind in type(source).__mro__):
        return "for a model pass nnx.state(model)"
    return "pass a path, a Hub id or a mapping of arrays"


def _unwrapped(contents: Mapping[Any, Any], label: str, *, use_ema: bool) -> Mapping[Any, Any]:
    averaged = _first_mapping(contents, AVERAGED)
    if use_ema:
        if averaged is None:
            names = " or ".join(map(repr, AVERAGED))
            raise WeightsError(f"{label}: use_ema=True, but there is no {names}; its top level has {listed(contents)}")
        contents = contents[averaged]
    while wrapper := _first_mapping(contents, _WRAPPERS):
        contents = contents[wrapper]
    if (averaged := _first_mapping(contents, AVERAGED)) is not None:
        raise WeightsError(f"{label}: only averaged weights, {averaged!r}; use_ema=True (--use-ema) takes them")
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


def _without_wrapping_steps(items: list[tuple[str, Any]], prefix: str) -> tuple[list[tuple[str, Any]], str]:
    """Remove the steps of `_WRAPPING_STEPS` from names and prefix, unless two names would become one."""

    def shortened(name: str) -> str:
        return ".".join(step for step in name.split(".") if step not in _WRAPPING_STEPS)

    short = [(shortened(name) or name, value) for name, value in items]
    if len({name for name, _ in short}) < len({name for name, _ in items}):
        return items, prefix
    return short, shortened(prefix)


def _without_common_start(items: list[tuple[str, Any]], prefix: str) -> list[tuple[str, Any]]:
    """Remove the starts of `_COMMON`; a number at the top, such as an epoch, does not keep them."""
    while starts := next((starts for starts in _COMMON if _all_start_with(items, starts)), None):
        if f"{prefix}.".startswith(starts):
            break  # the prefix that was asked for includes it
        items = [(_without_start(name, starts), value) for name, value in items]
    return items


def _all_start_with(items: list[tuple[str, Any]], starts: tuple[str, ...]) -> bool:
    inside = [name for name, value in items if "." in name or _shape(value)]
    return bool(inside) and all(name.startswith(starts) for name in inside)


def _without_start(name: str, starts: tuple[str, ...]) -> str:
    return next((name.removeprefix(start) for start in starts if name.startswith(start)), name)


def _with_statistics_in_params(items: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Move Flax Linen's `batch_stats` (BatchNorm's statistics) into the `params` beside them."""
    above_parameters = {name[: found.start()] for name, _ in items for found in _PARAMETERS.finditer(name)}

    def moved(name: str) -> str:
        found = _STATISTICS.fullmatch(name)
        return f"{found[1]}params.{found[2]}" if found and found[1] in above_parameters else name

    return [(moved(name), value) for name, value in items]
