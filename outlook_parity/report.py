"""What a verification found: the rows, the verdict, and how both are shown."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

Verdict = Literal["pass", "mismatch", "not-run"]
RowVerdict = Literal["pass", "zero", "skipped", "mismatch", "not-run"]

JSON_VERSION = 4

# How many of the differences that change no number are printed.
NOTES = 5

# Of a row that passes although its relative error, of a true zero, is of any size.
EXCUSED = "as large as rounding makes it: the true value is zero"

PROPAGATED = "propagated"
ALONE = {"torch": " (alone, torch's)", "jax": " (alone, jax's)"}

# The ways of calling a twin again that change nothing in its outputs, unless it is not deterministic, keeps state, or
# mixes the samples of a batch.
TWICE, REVERSED = "called twice", "batch reversed"

_STYLES = {"pass": "green", "zero": "yellow", "skipped": "yellow", "mismatch": "bold red", "not-run": "yellow"}


@dataclass(frozen=True)
class Noise:
    """A twin's error against the float64 truth, in units of rounding: eps of the dtype times the truth's own size."""

    rms: float
    max: float


@dataclass(frozen=True)
class Check:
    """One tensor compared.

    Attributes:
        level: "weights", "forward", "layers", "gradients", "training"; "again" of the same copies of the twins called
            once more; or "self-check" of what the verifier itself does.
        dtype: the precision that the twins computed in; "as given" for weights.
        name: the tensor under its torch name; of layers the module's path.
        verdict: "zero" if it is exactly zero in both twins: no difference, but no evidence either; "skipped" if only
            one twin has such a module, which is no difference either.
        bound: the largest `measured` that passes.
        measured: in float64 and for weights the relative error max|torch - jax| / max|jax|; in lower precisions the
            factor between the twins' noises. None if it could not be measured: then `note` says why.
        torch_noise: of the PyTorch twin, in lower precisions.
        jax_noise: of the JAX twin, likewise.
        note: in words.
        metrics: of outputs, and of what mismatches: how far apart the twins are; see `outlook_parity.metrics.measure`.
        view: of a layer, on whose input: "propagated", each twin's own; else the twin whose input both were given.
    """

    level: str
    dtype: str
    name: str
    verdict: RowVerdict
    bound: float
    measured: float | None = None
    torch_noise: Noise | None = None
    jax_noise: Noise | None = None
    note: str = ""
    view: str = ""
    metrics: Mapping[str, float] | None = None


@dataclass(frozen=True)
class SelfNoise:
    """How far a twin is from itself when the same copy of it is called again; part of no verdict.

    Attributes:
        twin: "torch" or "jax".
        dtype: what it computed in.
        how: "called twice" on the same inputs, or "batch reversed" and its outputs put back in order.
        measured: max|again - first| / max|first|, infinite where shapes differ.
        units: the same in units of rounding of the dtype.
    """

    twin: str
    dtype: str
    how: str
    measured: float
    units: float


@dataclass(frozen=True)
class Report:
    """The outcome of `verify`.

    Attributes:
        verdict: "pass", "mismatch", or "not-run" if something that was asked for could not be compared.
        reason: why nothing (or too little) was compared, or None.
        first_divergence: path of the first module known to be wrong, or None.
        cause: what is wrong, in words, where that is known.
        differences: what the models say differently about themselves, each in words; no difference of numbers by
            itself.
        notes: what else should be known: that a twin is not deterministic, or a level left out.
        self_noise: of each twin and dtype, measured before anything else.
        checks: one row per tensor, level and dtype.
        curves: optimizer -> twin -> loss, step by step, in the first dtype that was trained in.
        environment: versions and devices.
    """

    verdict: Verdict
    checks: tuple[Check, ...] = ()
    reason: str | None = None
    first_divergence: str | None = None
    cause: str | None = None
    differences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    self_noise: tuple[SelfNoise, ...] = ()
    curves: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return everything as JSON, as `report.schema.json` beside this file says; NaN and Inf become null."""
        return json.dumps(self._as_json(), indent=2, allow_nan=False)

    def to_html(self, path: str | PathLike[str], *, title: str = "") -> None:
        """Write everything as one HTML page that needs no network.

        Raises:
            OSError: the file cannot be written.
        """
        from outlook_parity.page import render

        page = render({"title": title, "sentence": _findings(self), **self._as_json()})
        Path(path).write_text(page, encoding="utf-8")

    def to_junit(self, path: str | PathLike[str]) -> None:
        """Write everything as JUnit XML, which CI systems show.

        Raises:
            OSError: the file cannot be written.
        """
        from outlook_parity.junit import to_junit

        Path(path).write_text(to_junit(self), encoding="utf-8")

    def _as_json(self) -> dict[str, Any]:
        return {"version": JSON_VERSION, **_finite(asdict(self))}

    def __str__(self) -> str:
        return sentence(self)


def sentence(report: Report) -> str:
    """Return the verdict in words."""
    if report.verdict == "not-run":
        return f"NOT RUN: {report.reason}"
    if report.verdict == "mismatch":
        wrong = [check for check in report.checks if check.verdict == "mismatch"]
        cause = f"; {report.cause}" if report.cause else ""
        return f"MISMATCH: {len(wrong)} of {len(report.checks)} checks differ{cause}"
    exact = [
        check.measured
        for check in report.checks
        if check.dtype == "float64" and check.measured is not None and check.note != EXCUSED
    ]
    factors = [check.measured for check in report.checks if check.torch_noise and check.measured is not None]
    lower = list(dict.fromkeys(check.dtype for check in report.checks if check.torch_noise))
    findings = []
    if exact:
        findings.append(f"equal to rounding in float64 (largest relative error {max(exact):.1e})")
    if factors:
        findings.append(f"equally exact in {', '.join(lower)} (rounding errors within a factor of {max(factors):.2f})")
    return f"PASS: the twins are {' and '.join(findings)}"


def _findings(report: Report) -> str:
    """Return the verdict in words without the verdict itself and the cause."""
    return sentence(report).partition(": ")[2].removesuffix(f"; {report.cause}")


def show(report: Report, console: Console, *, title: str = "", every_row: bool = True) -> None:
    """Print a table of the checks, and the verdict in words.

    Unless it is `every_row`, of each part of the model those that pass are one row: the worst of them.
    """
    if report.checks:
        console.print(_table(report, title, every_row), highlight=False)
    if report.self_noise:
        console.print(_self_noise_table(report.self_noise), highlight=False)
    for note in report.notes:
        console.print(Text(f"note: {note}", style="yellow"), soft_wrap=True)
    if report.verdict == "pass":  # of a mismatch the cause is said
        for difference in report.differences[:NOTES]:
            console.print(Text(f"note: {difference}", style="yellow"), soft_wrap=True)
    console.print(Text(sentence(report), style=_STYLES[report.verdict]), soft_wrap=True)


# Far more than rounding makes of another order of sums.
MANY_UNITS = 1e4


def notes_on(noises: Sequence[SelfNoise]) -> list[str]:
    """Return in words what self-noises say of the twins, of each kind the largest."""
    notes = []
    for (twin, how), group in groupby(sorted(noises, key=lambda n: (n.twin, n.how)), key=lambda n: (n.twin, n.how)):
        worst = max(group, key=lambda noise: noise.units)
        size = f"{worst.measured:.1e} of the largest output in {worst.dtype}"
        if how == TWICE and worst.measured:
            notes.append(f"{twin} is not deterministic, or keeps state: called twice its outputs differ by {size}")
        elif worst.units > MANY_UNITS:
            notes.append(f"{twin} mixes the samples of a batch: in another order of them its outputs differ by {size}")
    return notes


def _self_noise_table(noises: Sequence[SelfNoise]) -> Table:
    table = Table(
        title="self-noise, before anything was compared", title_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("twin against itself")
    for how in dict.fromkeys(noise.how for noise in noises):
        table.add_column(how, justify="right")
    for (twin, dtype), group in groupby(noises, key=lambda noise: (noise.twin, noise.dtype)):
        sizes = ("equal" if not noise.measured else f"{noise.units:.2g} units" for noise in group)
        table.add_row(f"  {twin}, {dtype}", *sizes)
    return table


def part_of(name: str) -> str:
    """Return the part of the model that a tensor belongs to, as in "network.0", with the optimizer if there is one."""
    optimizer, colon, tensor = name.rpartition(": ")
    first, *rest = tensor.split(".")
    numbered = rest and rest[0].isdigit()
    return optimizer + colon + (f"{first}.{rest[0]}" if numbered else first)


def _shown(checks: Sequence[Check], every_row: bool) -> list[tuple[str, Check]]:
    """Return rows with what they are called."""
    if every_row:
        return [(check.name, check) for check in checks]
    shown = []
    for part, members in groupby(checks, key=lambda check: part_of(check.name)):
        together = list(members)
        passing = [check for check in together if check.verdict == "pass"]
        wrong = [check for check in together if check.verdict in ("mismatch", "not-run")]
        followed = [check for check in wrong if check.view == PROPAGATED]  # as something before it is wrong
        shown += [(check.name, check) for check in wrong if check.view != PROPAGATED]
        zeros = [check for check in together if check.verdict == "zero"]
        for alike in filter(None, (followed, passing, zeros)):
            worst = max(alike, key=lambda check: check.measured or 0.0)
            shown.append((f"{part} ({len(alike)})" if len(alike) > 1 else worst.name, worst))
    return shown


def _table(report: Report, title: str, every_row: bool) -> Table:
    caption = (
        "noise: error against the float64 truth in units of rounding, RMS / largest\n"
        "found: relative error in float64, else the factor (×) between the noises\n"
        "(noises too small to tell apart count as equal)"
        "\nalone: on the numbers of that twin, where what goes wrong elsewhere cannot reach"
    ) + ("" if every_row else "\npart (n): the worst of its n tensors that pass")
    table = Table(
        title=title, caption=caption, title_justify="left", caption_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("compared", overflow="fold")
    for column in ("torch noise", "jax noise", "found", "at most"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", min_width=len("mismatch"))
    for section, checks in groupby(report.checks, key=lambda check: f"{check.level}, {check.dtype}"):
        table.add_row(Text(section, style="bold"))
        for name, check in _shown(list(checks), every_row):
            table.add_row(
                f"  {name}" + ALONE.get(check.view, ""),
                _noise_cell(check.torch_noise),
                _noise_cell(check.jax_noise),
                _size(check, check.measured),
                _size(check, check.bound),
                Text(check.verdict + (f": {check.note}" if check.note else ""), style=_STYLES[check.verdict]),
            )
    return table


def _noise_cell(noise: Noise | None) -> str:
    sizes = () if noise is None else (noise.rms, noise.max)
    return " / ".join(f"{size:.0f}" if 10 <= size < 1e4 else f"{size:.2g}" for size in sizes)


def _size(check: Check, number: float | None) -> str:
    if number is None:
        return ""
    if check.torch_noise is not None:
        return f"× {number:.3g}"
    return f"{number:.1e}" if number else "equal"


def _finite(value: Any) -> Any:
    """Return `value` as JSON has it."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
