"""The level "layers": every module of both twins, propagated and isolated. Imports no framework.

Propagated, each twin has its own input. Isolated, the arguments of a module and the results of each module inside are
the other twin's: so the row of a module tells of its own code and parameters alone, and the first that is wrong
isolated is where the bug is.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from outlook_parity.compare.event_axes import event_axes, in_jax_layout, in_torch_layout, is_repeated, with_axes
from outlook_parity.compare.noise import sum_noise
from outlook_parity.compare.patterns import how_they_differ
from outlook_parity.compare.ranking import MOST_MEASURED, ranked
from outlook_parity.compare.tensors import FACTOR_BOUND, RELATIVE_BOUNDS, TensorPair, compare_pair, relative_error
from outlook_parity.core.check import PROPAGATED, TWINS, Check, RowVerdict, Tensors
from outlook_parity.core.precision import PRECISIONS, TRUTH
from outlook_parity.core.recorder import ROOT, Arrays, Events, Key, Recorder, shapes_of
from outlook_parity.core.request import Request
from outlook_parity.core.runner import Runner

MODEL = "(model)"  # what the outermost module is called

OTHER = {"torch": "jax", "jax": "torch"}


@dataclass(frozen=True)
class Suspect:
    """A module whose own code is wrong.

    Attributes:
        path: its path.
        where: in words, where in its code.
        dtype: the precision in which it shows.
        view: the twin whose input both were given, or "propagated".
        before: the module inside that it calls with wrong arguments, None if its own results are wrong.
        how: in words, how the numbers differ.
        error: the size of the difference, relative to the largest of the numbers.
        key: the event that shows it.
    """

    path: str
    where: str
    dtype: str
    view: str
    before: str | None = None
    how: str = ""
    error: float = 1.0
    key: Key | None = None


@dataclass
class ModuleResults:
    """What the level found.

    Attributes:
        checks: the rows.
        suspects: wrong modules, ranked.
        outputs: of each twin and perhaps the "truth", computed module by module.
        inputs: of the first suspects by path, as JAX takes them.
    """

    checks: list[Check] = field(default_factory=list)
    suspects: list[Suspect] = field(default_factory=list)
    outputs: dict[str, Tensors] = field(default_factory=dict)
    inputs: dict[str, np.ndarray] = field(default_factory=dict)


def verify_modules(
    torch: Runner, jax: Runner, request: Callable[[str], Request], dtype: str, step: Callable[..., None]
) -> ModuleResults:
    """Compare every module of the twins in one precision.

    Args:
        torch: PyTorch's runner.
        jax: JAX's.
        request: returns that for a run in a precision, on numbers rounded to `dtype`.
        dtype: the precision.
        step: called before each run with what it is.
    """
    return _Comparison({"torch": torch, "jax": jax}, request, dtype, step).results()


def compare_recorded(torch: Events, jax: Events, truth: Events | None, dtype: str) -> tuple[list[Check], list[Suspect]]:
    """Compare every module of two recorded runs, each on its own input.

    Returns:
        The rows, and the modules whose results differ in the order in which they return.
    """
    shared = _shared(torch, jax)
    axes, rows = event_axes(torch, jax, shared), _Rows(dtype, shared)
    events = {"torch": in_jax_layout(torch, axes), "jax": jax, "truth": None}
    if truth is not None:
        events["truth"] = in_jax_layout(truth, axes)
    suspects = rows.compare(PROPAGATED, events, _callees(torch))
    return [*rows.rows(), *_unshared({"torch": torch, "jax": jax}, shared, dtype)], suspects


def shown_path(path: str) -> str:
    """Return a module's path as the report has it."""
    return path or MODEL


class _Comparison:
    """Record both twins, replay each recording to the other twin, and compare."""

    def __init__(
        self,
        runners: Mapping[str, Runner],
        request: Callable[[str], Request],
        dtype: str,
        step: Callable[..., None],
    ) -> None:
        self._runners, self._dtype, self._step = runners, dtype, step
        self._request, self._truth_request = request(dtype), request(TRUTH)
        self._outputs: dict[str, Tensors] = {}
        self._answers: Events = {}  # of JAX's modules on the numbers of torch
        events = {twin: self._record(twin) for twin in TWINS}
        self._events = events
        self._shared = _shared(events["torch"], events["jax"])
        self._axes = event_axes(events["torch"], events["jax"], self._shared, runners["torch"].kinds())

    def results(self) -> ModuleResults:
        rows = _Rows(self._dtype, self._shared, self._request.positions)
        torch_events = self._in_jax_layout("torch", self._events["torch"])
        rows.compare(
            PROPAGATED,
            {"torch": torch_events, "jax": self._events["jax"], "truth": self._record_truth()},
            _callees(self._events["torch"]),
        )
        replayable = {
            "torch": torch_events,
            "jax": with_axes(self._events["jax"], self._axes),
        }
        suspects = [suspect for giver in TWINS for suspect in self._replay(giver, replayable[giver], rows)]
        suspects = ranked(suspects, self._effect)
        inputs: dict[str, np.ndarray] = {}
        for path in list(dict.fromkeys(suspect.path for suspect in suspects))[:MOST_MEASURED]:
            arrays = torch_events.get(Key(path, 0, "in"), [])
            inputs.update(zip([path], arrays, strict=False))
        checks = [*rows.rows(), *_unshared(self._events, self._shared, self._dtype)]
        return ModuleResults(checks, suspects, self._outputs, inputs)

    def _record(self, twin: str) -> Events:
        self._step(f"layers: {twin} in {self._dtype}")
        recorder = Recorder()
        self._outputs[twin] = self._runners[twin].watch(self._request, recorder)
        return recorder.events

    def _record_truth(self) -> Events | None:
        """Return what the modules give in float64, in JAX's layout; None if that is what the twins computed in."""
        if self._dtype == TRUTH:
            return None
        self._step("layers: the truth in float64")
        recorder = Recorder()
        self._outputs["truth"] = self._runners["torch"].watch(self._truth_request, recorder)
        return self._in_jax_layout("torch", recorder.events)

    def _replay(self, giver: str, recorded: Events, rows: "_Rows") -> list[Suspect]:
        """Run the other twin on what one recorded (in JAX's layout), and compare the two; return wrong modules."""
        other = OTHER[giver]
        self._step(f"layers: {other} in {self._dtype} on the numbers of {giver}")
        replayed, owners = self._replay_to(other, recorded, self._request)
        truth = None
        if self._dtype != TRUTH:
            truth, _ = self._replay_to("torch", recorded, self._truth_request)
        if giver == "torch":
            self._answers = replayed
        return rows.compare(giver, {giver: recorded, other: replayed, "truth": truth}, owners)

    def _effect(self, suspects: Sequence[Suspect]) -> float | None:
        """Return by how much torch's outputs change if one module gives what JAX's gives on the same numbers.

        None if it cannot be told. `suspects` are all of that module.
        """
        # Of JAX on torch's numbers: what is wrong in the other view alone would undo what the module gives inside.
        keys = {suspect.key for suspect in suspects if suspect.view == "torch" and suspect.key is not None}
        answers = {key: self._answers[key] for key in keys if key in self._answers}
        replacements = in_torch_layout(answers, self._axes)
        if not replacements or any(not self._can_replace(key, arrays) for key, arrays in replacements.items()):
            return None
        self._step(f"layers: torch in {self._dtype} with {shown_path(suspects[0].path)} of jax", extra=True)
        recorder = Recorder(replacements, self._shared)
        changed, given = self._runners["torch"].watch(self._request, recorder), self._outputs["torch"]
        return max(
            (relative_error(array, given[name]) for name, array in changed.items() if name in given), default=0.0
        )

    def _can_replace(self, key: Key, arrays: Arrays) -> bool:
        """Whether torch takes these in place of its own: not integers, nor arrays of other shapes."""
        own = self._events["torch"]
        return key.side != "whole" and key in own and [array.shape for array in arrays] == shapes_of(own, key)

    def _replay_to(self, twin: str, recorded: Events, request: Request) -> tuple[Events, Mapping[Key, str]]:
        """Return what a twin computes from a recording, in JAX's layout, and whose own code computed it."""
        recorder = Recorder(recorded if twin == "jax" else in_torch_layout(recorded, self._axes), self._shared)
        self._runners[twin].watch(request, recorder)
        return self._in_jax_layout(twin, recorder.events), recorder.owners

    def _in_jax_layout(self, twin: str, events: Events) -> Events:
        return events if twin == "jax" else in_jax_layout(events, self._axes)


def _shared(torch: Events, jax: Events) -> list[str]:
    """Return the modules that both twins call equally often, in the order in which they return."""
    calls = [Counter(key.path for key in events if key.side == "out") for events in (torch, jax)]
    return [path for path, count in calls[0].items() if calls[1].get(path) == count]


def _callees(events: Events) -> dict[Key, str]:
    """Return for each result the module that gave it: on its own input, arguments are the callers' doing."""
    return {key: key.path for key in events if key.side != "in"}


class _Rows:
    """One row per module and view: the worst of its calls and arrays."""

    def __init__(self, dtype: str, shared: Sequence[str], positions: np.ndarray | None = None) -> None:
        self._dtype, self._shared, self._members = dtype, shared, set(shared)
        self._positions = positions  # that count, of the leading axes of arrays; None for all
        self._worst: dict[tuple[str, str], Check] = {}

    def rows(self) -> list[Check]:
        """Return the rows, module by module in the order in which they return."""
        views = (PROPAGATED, *TWINS)
        return [row for path in self._shared for view in views if (row := self._worst.get((path, view))) is not None]

    def compare(self, view: str, events: Mapping[str, Events | None], owners: Mapping[Key, str]) -> list[Suspect]:
        """Compare the events of both twins, in JAX's layout.

        Args:
            view: of the rows.
            events: of "torch", "jax" and perhaps "truth".
            owners: of the events to compare, the module whose row they belong to.

        Returns:
            The modules that are wrong, in the order of events.
        """
        suspects: list[Suspect] = []
        pending: list[tuple[Key, str, Check]] = []  # of other shapes; the next results that compare decide

        def add(key: Key, path: str, check: Check) -> None:
            self._add(path, check := replace(check, view=view, note=check.note or _where(key, path, check)))
            if check.verdict == "mismatch":
                before = key.path if key.side == "in" else None
                how = _how(key, events) if not suspects else ""
                error = _relative(check, self._dtype)
                suspects.append(Suspect(path, check.note, self._dtype, view, before, how, error, key))

        for key, path in owners.items():
            if path not in self._members or key.path not in self._members:
                continue
            if shapes := _other_shapes(key, events):
                pending.append((key, path, self._shape_row(path, shapes)))
                continue
            checks = list(self._checks(key, path, events))
            for earlier in pending if checks else ():
                add(*_decided(*earlier, agree=all(check.verdict in ("pass", "zero") for check in checks)))
            pending = [] if checks else pending
            for check in checks:
                add(key, path, check)
        for undecided in pending:
            add(*undecided)
        return suspects

    def _add(self, path: str, check: Check) -> None:
        worst = self._worst.get((path, check.view))
        if worst is None or _badness(check) > _badness(worst):
            self._worst[path, check.view] = check

    def _shape_row(self, path: str, shapes: str) -> Check:
        return Check("layers", self._dtype, shown_path(path), "mismatch", 0.0, note=shapes)

    def _counting(self, array: np.ndarray) -> np.ndarray:
        """Return an array in float64, zero at positions that do not count."""
        array, kept = array.astype(np.float64), self._positions
        if kept is None or array.shape[: kept.ndim] != kept.shape:
            return array
        return np.where(kept.reshape(kept.shape + (1,) * (array.ndim - kept.ndim)), array, 0.0)

    def _checks(self, key: Key, path: str, events: Mapping[str, Events | None]) -> Iterator[Check]:
        """Compare the arrays of one event."""
        torch, jax, truth = events["torch"] or {}, events["jax"] or {}, events["truth"]
        torch_arrays, jax_arrays = torch.get(key), jax.get(key)
        if torch_arrays is None or jax_arrays is None or len(torch_arrays) != len(jax_arrays):
            return
        if key.side == "whole" and truth is not None:  # rounding may decide integers
            return
        bound = RELATIVE_BOUNDS["forward"] if truth is None else FACTOR_BOUND
        exacts = None if truth is None else truth.get(key)
        first = Key(path, 0, "in")
        numbers = sum(math.prod(shape) for shape in shapes_of(torch, first)) if first in torch else 0
        for index, (one, other) in enumerate(zip(torch_arrays, jax_arrays, strict=True)):
            exact = None if exacts is None else exacts[index]
            if one.size == 0 or (truth is not None and exact is None):
                continue
            # A sum over n numbers may be added up in any order: here over those that make one of the results.
            least = sum_noise(numbers / one.size, self._dtype)
            if one.shape != other.shape and is_repeated(one.shape, other.shape):
                whole = np.broadcast_shapes(one.shape, other.shape)
                one, other = np.broadcast_to(one, whole), np.broadcast_to(other, whole)
                exact = None if exact is None else np.broadcast_to(exact, whole)
            pair = TensorPair(shown_path(path), self._counting(one), self._counting(other))
            exact = None if exact is None else self._counting(exact)
            yield compare_pair("layers", self._dtype, pair, bound=bound, truth=exact, least=least)


def _relative(check: Check, dtype: str) -> float:
    """Return the size of a difference relative to the numbers, 1 where it was not measured."""
    if check.measured is None:
        return 1.0
    noises = [noise.rms for noise in (check.torch_noise, check.jax_noise) if noise is not None]
    return max(noises) * PRECISIONS[dtype].epsilon if noises else check.measured


def _decided(key: Key, path: str, check: Check, *, agree: bool) -> tuple[Key, str, Check]:
    """Return the row of results of other shapes, by whether what is computed of them agrees."""
    verdict: RowVerdict = "skipped" if agree else "mismatch"
    note = f"{check.note}; what is computed from it agrees" if agree else check.note
    return key, path, replace(check, verdict=verdict, note=note)


def _how(key: Key, events: Mapping[str, Events | None]) -> str:
    """Return in words how the arrays of an event differ, "" if in no known way."""
    torch, jax = ((events[twin] or {}).get(key, []) for twin in TWINS)
    for one, other in zip(torch, jax, strict=False):
        if words := how_they_differ(one.astype(np.float64), other.astype(np.float64)):
            return words
    return ""


def _other_shapes(key: Key, events: Mapping[str, Events | None]) -> str:
    """Return the shapes of a module's results in words, if they differ between the twins; "" if not.

    Integers may differ between the twins, and so may arguments: what is computed from them decides.
    """
    recorded = [events[twin] or {} for twin in TWINS]
    torch, jax = (shapes_of(one, key) if key in one else None for one in recorded)
    fit = torch is not None and jax is not None and len(torch) == len(jax)
    return "" if fit or key.side != "out" else f"{_shapes(torch)} in torch, {_shapes(jax)} in jax"


def _shapes(shapes: list[tuple[int, ...]] | None) -> str:
    return "another shape" if shapes is None else f"shapes {shapes}"


def _where(key: Key, path: str, check: Check) -> str:
    if check.verdict != "mismatch" or key.side != "in":
        return ""
    return f"calls {shown_path(key.path)} with other arguments"


def _badness(check: Check) -> tuple[int, float]:
    order = {"skipped": 0, "zero": 1, "pass": 2, "not-run": 3, "mismatch": 4}
    return order[check.verdict], (check.measured or 0.0) / (check.bound or 1.0)


def _unshared(events: Mapping[str, Events], shared: Sequence[str], dtype: str) -> list[Check]:
    """Return a row for each module that only one twin calls, or one more often than the other."""
    calls = {twin: Counter(key.path for key in events[twin] if key.side == "out") for twin in TWINS}
    rows, members = [], set(shared)
    for path in dict.fromkeys([*calls["torch"], *calls["jax"]]):
        if path not in members and path != ROOT:
            note = ", ".join(f"called {calls[twin][path]} times in {twin}" for twin in TWINS)
            rows.append(Check("layers", dtype, shown_path(path), "skipped", 0.0, note=note))
    return rows
