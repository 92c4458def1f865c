"""The level "layers": every module of both twins, as it came and alone on the other's numbers. Imports no framework.

Alone means that what a module is called with, and what each module inside gives back, is the other twin's: so the row
of a module tells of its own code and parameters and of nothing else. The first that is wrong alone is where the bug is.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from outlook_parity.compare.noise import sum_noise
from outlook_parity.compare.patterns import how_they_differ
from outlook_parity.compare.tensors import (
    FACTOR_BOUND,
    RELATIVE_BOUNDS,
    TensorPair,
    Tensors,
    compare_pair,
)
from outlook_parity.core.check import PROPAGATED, TWINS, Check, RowVerdict
from outlook_parity.core.precision import TRUTH
from outlook_parity.core.recorder import ROOT, Arrays, Key, Recorder, axes_to_jax
from outlook_parity.core.request import Request
from outlook_parity.core.runner import Runner

MODEL = "(model)"  # what the outermost module is called

Axes = dict[tuple[Key, int], tuple[int, ...]]
Events = Mapping[Key, Arrays]


@dataclass(frozen=True)
class Suspect:
    """A module whose own code is wrong.

    Attributes:
        path: its path.
        where: in words, where in its code.
        dtype: in which it shows.
        view: the twin on whose numbers.
        before: the module inside that it calls with something else, None if what it gives back itself is wrong.
        how: in words, how the numbers differ.
    """

    path: str
    where: str
    dtype: str
    view: str
    before: str | None = None
    how: str = ""


@dataclass
class Layers:
    """What the level found."""

    checks: list[Check] = field(default_factory=list)
    suspects: list[Suspect] = field(default_factory=list)  # in the order of events
    outputs: dict[str, Tensors] = field(default_factory=dict)  # by twin, computed module by module
    inputs: dict[str, np.ndarray] = field(default_factory=dict)  # of suspects by path, as JAX takes them


def verify_layers(
    torch: Runner, jax: Runner, request: Callable[..., Request], dtype: str, device: str, step: Callable[[str], None]
) -> Layers:
    """Compare every module of the twins in one dtype.

    Args:
        torch: PyTorch's twin.
        jax: JAX's.
        request: makes one, of a dtype and a device.
        dtype: a dtype.
        device: where the twins run; the truth is PyTorch's on the CPU.
        step: called before each run with what it is.
    """
    own = request(dtype=dtype, device="cpu" if dtype == TRUTH else device)
    exact = request(dtype=TRUTH, device="cpu")
    twins = {"torch": torch, "jax": jax}
    recorders, found = {name: Recorder() for name in TWINS}, Layers()
    for name, twin in twins.items():
        step(f"layers: {name} in {dtype}")
        found.outputs[name] = twin.watch(own, recorders[name])
    known = _known(recorders["torch"], recorders["jax"])
    axes = _axes(recorders["torch"].events, recorders["jax"].events, known)

    played = {
        "torch": _in_jax_layout(recorders["torch"].events, axes),
        "jax": {key: arrays for key, arrays in recorders["jax"].events.items() if _has_axes(key, arrays, axes)},
    }
    truth: dict[str, Events] = {}
    if dtype != TRUTH:
        step("layers: the truth in float64")
        recorder = Recorder()
        found.outputs["truth"] = torch.watch(exact, recorder)
        truth[PROPAGATED] = _in_jax_layout(recorder.events, axes)

    rows = _Rows(dtype, known)
    rows.compare(
        PROPAGATED,
        {"torch": played["torch"], "jax": recorders["jax"].events, "truth": truth.get(PROPAGATED)},
        {key: key.path for key in recorders["torch"].events if key.side != "in"},
    )
    for giver, other in (("torch", "jax"), ("jax", "torch")):
        step(f"layers: {other} in {dtype} on the numbers of {giver}")
        forced = Recorder(_for(other, played[giver], axes), known)
        twins[other].watch(own, forced)
        events = {giver: played[giver], other: _from(other, forced.events, axes), "truth": None}
        if dtype != TRUTH:
            exactly = Recorder(_for("torch", played[giver], axes), known)
            torch.watch(exact, exactly)
            events["truth"] = _from("torch", exactly.events, axes)
        found.suspects += rows.compare(giver, events, forced.owners)
    for suspect in found.suspects[:1]:
        arrays = played["torch"].get(Key(suspect.path, 0, "in"), [])
        found.inputs.update(zip([suspect.path], arrays, strict=False))
    found.checks = [*rows.rows(), *_unmatched(recorders, known, dtype)]
    return found


def propagated(torch: Events, jax: Events, truth: Events | None, dtype: str) -> tuple[list[Check], list[Suspect]]:
    """Compare every module of two recorded runs, each on its own input.

    Returns:
        The rows, and the modules whose results differ in the order in which they return.
    """
    recorders = {"torch": Recorder(), "jax": Recorder()}
    recorders["torch"].events, recorders["jax"].events = dict(torch), dict(jax)
    known = _known(recorders["torch"], recorders["jax"])
    axes, rows = _axes(torch, jax, known), _Rows(dtype, known)
    events = {"torch": _in_jax_layout(torch, axes), "jax": jax, "truth": None}
    if truth is not None:
        events["truth"] = _in_jax_layout(truth, axes)
    suspects = rows.compare(PROPAGATED, events, {key: key.path for key in torch if key.side != "in"})
    return [*rows.rows(), *_unmatched(recorders, known, dtype)], suspects


def shown_path(path: str) -> str:
    """Return a module's path as the report has it."""
    return path or MODEL


def _known(torch: Recorder, jax: Recorder) -> list[str]:
    """Return the modules that both twins call equally often, in the order in which they return."""
    returns = [[key.path for key in recorder.events if key.side == "out"] for recorder in (torch, jax)]
    calls = [Counter(paths) for paths in returns]
    return [path for path, count in calls[0].items() if calls[1].get(path) == count]


def _axes(torch: Events, jax: Events, known: Sequence[str]) -> Axes:
    """Return for each array of either side in which order JAX has PyTorch's axes; without those that do not fit."""
    found: Axes = {}
    members = set(known)
    for key, arrays in torch.items():
        others = jax.get(key, [])
        if key.path in members and len(arrays) == len(others):
            for index, (one, other) in enumerate(zip(arrays, others, strict=True)):
                axes = axes_to_jax(one, other) if one.ndim == other.ndim else None
                if axes is not None:
                    found[key, index] = axes
    return found


def _has_axes(key: Key, arrays: Arrays, axes: Axes) -> bool:
    return all((key, index) in axes for index in range(len(arrays)))


def _in_jax_layout(events: Events, axes: Axes) -> dict[Key, Arrays]:
    return {
        key: [array.transpose(axes[key, index]) for index, array in enumerate(arrays)]
        for key, arrays in events.items()
        if _has_axes(key, arrays, axes) and all(array.ndim == len(axes[key, i]) for i, array in enumerate(arrays))
    }


def _for(twin: str, events: Events, axes: Axes) -> Events:
    """Return events in JAX's layout in the layout of `twin`."""
    if twin == "jax":
        return events
    return {
        key: [array.transpose(np.argsort(axes[key, index])) for index, array in enumerate(arrays)]
        for key, arrays in events.items()
    }


def _from(twin: str, events: Events, axes: Axes) -> Events:
    return events if twin == "jax" else _in_jax_layout(events, axes)


class _Rows:
    """One row per module and view: the worst of its calls and arrays."""

    def __init__(self, dtype: str, known: Sequence[str]) -> None:
        self._dtype, self._known = dtype, known
        self._worst: dict[tuple[str, str], Check] = {}

    def compare(self, view: str, events: Mapping[str, Events | None], owners: Mapping[Key, str]) -> list[Suspect]:
        """Compare events of both twins; return what modules are wrong, in the order of events."""
        suspects: list[Suspect] = []
        truth = events["truth"]
        members = set(self._known)
        torch, jax = events["torch"] or {}, events["jax"] or {}
        apart: list[tuple[Key, str, Check]] = []  # of shapes of their own, of which the next that compare will tell

        def note(key: Key, path: str, check: Check) -> None:
            check = replace(check, view=view, note=check.note or _where(key, path, check))
            old = self._worst.get((path, view))
            if old is None or _badness(check) > _badness(old):
                self._worst[path, view] = check
            if check.verdict == "mismatch":
                before = key.path if key.side == "in" else None
                how = self._how(key, events) if not suspects else ""
                suspects.append(Suspect(path, check.note, self._dtype, view, before, how))

        for key, path in owners.items():
            if path not in members or key.path not in members:
                continue
            if shapes := _shapes_of_their_own(key, torch, jax):
                apart.append((key, path, Check("layers", self._dtype, shown_path(path), "mismatch", 0.0, note=shapes)))
                continue
            checks = list(self._checks(key, path, torch, jax, truth))
            made_up_for = bool(checks) and all(check.verdict in ("pass", "zero") for check in checks)
            for one, where, check in apart if checks else ():
                verdict: RowVerdict = "skipped" if made_up_for else "mismatch"
                how = f"{check.note}; what is made of it agrees" if made_up_for else check.note
                note(one, where, replace(check, verdict=verdict, note=how))
            apart = apart if not checks else []
            for check in checks:
                note(key, path, check)
        for found in apart:
            note(*found)
        return suspects

    def _how(self, key: Key, events: Mapping[str, Events | None]) -> str:
        arrays = [(events[twin] or {}).get(key, []) for twin in TWINS]
        for one, other in zip(*arrays, strict=False):
            if words := how_they_differ(one.astype(np.float64), other.astype(np.float64)):
                return words
        return ""

    def rows(self) -> list[Check]:
        """Return the rows, module by module in the order in which they return."""
        views = (PROPAGATED, *TWINS)
        return [row for path in self._known for view in views if (row := self._worst.get((path, view))) is not None]

    def _checks(self, key: Key, path: str, torch: Events, jax: Events, truth: Events | None) -> Iterator[Check]:
        bound = RELATIVE_BOUNDS["forward"] if truth is None else FACTOR_BOUND
        inputs = torch.get(Key(path, 0, "in"), [])
        ours, theirs = torch.get(key), jax.get(key)
        if ours is None or theirs is None or len(ours) != len(theirs):
            return
        if key.side == "whole" and truth is not None:  # rounding may decide them
            return
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            exact = None if truth is None else truth.get(key, [None] * len(ours))[index]
            if one.size == 0 or (truth is not None and exact is None):
                continue
            # A sum over n numbers may be added up in any order: here over those that make one of the results.
            least = sum_noise(sum(array.size for array in inputs) / one.size, self._dtype)
            pair = TensorPair(shown_path(path), one.astype(np.float64), other.astype(np.float64))
            exact = None if exact is None else exact.astype(np.float64)
            yield compare_pair("layers", self._dtype, pair, bound=bound, truth=exact, least=least)


def _shapes_of_their_own(key: Key, torch: Events, jax: Events) -> str:
    """Return in words what shapes a module gives, if they are not those of its twin; "" if they are.

    Whole numbers may be another affair in each twin, and so may arguments: what is made of them tells.
    """
    ours, theirs = torch.get(key), jax.get(key)
    fit = ours is not None and theirs is not None and len(ours) == len(theirs)
    return "" if fit or key.side != "out" else f"{_shapes(ours)} in torch, {_shapes(theirs)} in jax"


def _shapes(arrays: Arrays | None) -> str:
    return "a shape of its own" if arrays is None else f"shapes {[array.shape for array in arrays]}"


def _where(key: Key, path: str, check: Check) -> str:
    if check.verdict != "mismatch" or key.side != "in":
        return ""
    return f"calls {shown_path(key.path)} with something else"


def _badness(check: Check) -> tuple[int, float]:
    order = {"skipped": 0, "zero": 1, "pass": 2, "not-run": 3, "mismatch": 4}
    return order[check.verdict], (check.measured or 0.0) / (check.bound or 1.0)


def _unmatched(recorders: Mapping[str, Recorder], known: Sequence[str], dtype: str) -> list[Check]:
    """Return a row for each module that only one twin calls, or one more often than the other."""
    rows = []
    for path in dict.fromkeys([*recorders["torch"].paths(), *recorders["jax"].paths()]):
        if path not in known and path != ROOT:
            calls = {
                name: sum(key.path == path and key.side == "out" for key in recorder.events)
                for name, recorder in recorders.items()
            }
            note = ", ".join(f"called {count} times in {name}" for name, count in calls.items())
            rows.append(Check("layers", dtype, shown_path(path), "skipped", 0.0, note=note))
    return rows
