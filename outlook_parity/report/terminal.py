"""Report as tables on a terminal."""

from collections.abc import Sequence
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from outlook_parity.core.check import PROPAGATED, Check, Noise, SelfNoise
from outlook_parity.report.report import Report, sentence
from outlook_parity.report.text import shortened

MAX_DIFFERENCES = 5  # of hyperparameters that differ without a mismatch

_VIEWS = {"torch": " (on torch's input)", "jax": " (on jax's input)"}

_STYLES = {"pass": "green", "zero": "yellow", "skipped": "yellow", "mismatch": "bold red", "not-run": "yellow"}

_LEGEND = (
    "noise: error against the float64 truth in units of rounding, RMS / largest",
    "found: relative error in float64, else the factor (×) between the noises",
    "(noises too small to tell apart count as equal)",
    "on torch's (jax's) input: the module isolated, fed with that twin's numbers",
)
_LEGEND_OF_PARTS = "part (n): the worst of its n tensors that pass"


def print_report(report: Report, console: Console, *, title: str = "", every_row: bool = True) -> None:
    """Print the checks as a table, the notes, and the verdict in words as the last line.

    Unless it is `every_row`, the tensors of a part of the model that pass are one row: the worst of them.
    """
    if report.checks:
        console.print(_checks_table(report, title, every_row), highlight=False)
    if report.self_noise:
        console.print(_self_noise_table(report.self_noise), highlight=False)
    for note in _notes(report):
        console.print(Text(f"note: {shortened(note)}", style="yellow"), soft_wrap=True)
    console.print(Text(sentence(report), style=_STYLES[report.verdict]), soft_wrap=True)


def _notes(report: Report) -> list[str]:
    """Return the notes; of a report that passes also the first hyperparameters that differ."""
    if report.verdict != "pass":  # a mismatch has them as its cause
        return list(report.notes)
    notes = [*report.notes, *report.differences[:MAX_DIFFERENCES]]
    left_out = len(report.differences) - MAX_DIFFERENCES
    return [*notes, f"… and {left_out} more such differences"] if left_out > 0 else notes


def _self_noise_table(self_noise: Sequence[SelfNoise]) -> Table:
    table = Table(
        title="self-noise, before anything was compared", title_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("twin against itself")
    for how in dict.fromkeys(noise.how for noise in self_noise):
        table.add_column(how, justify="right")
    for (twin, dtype), group in groupby(self_noise, key=lambda noise: (noise.twin, noise.dtype)):
        sizes = ("equal" if not noise.measured else f"{noise.units:.2g} units" for noise in group)
        table.add_row(f"  {twin}, {dtype}", *sizes)
    return table


def _checks_table(report: Report, title: str, every_row: bool) -> Table:
    table = Table(
        title=title,
        caption="\n".join(_LEGEND if every_row else (*_LEGEND, _LEGEND_OF_PARTS)),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("compared", overflow="fold")
    for column in ("torch noise", "jax noise", "found", "at most"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", min_width=len("mismatch"))
    for section, checks in groupby(report.checks, key=lambda check: f"{check.level}, {check.dtype}"):
        table.add_row(Text(section, style="bold"))
        rows = list(checks)
        for name, check in [(row.name, row) for row in rows] if every_row else _worst_of_parts(rows):
            table.add_row(*_cells(name, check))
    return table


def _cells(name: str, check: Check) -> tuple[str | Text, ...]:
    verdict = check.verdict + (f": {shortened(check.note)}" if check.note else "")
    return (
        f"  {name}" + _VIEWS.get(check.view, ""),
        _noise_cell(check.torch_noise),
        _noise_cell(check.jax_noise),
        _size_cell(check, check.measured),
        _size_cell(check, check.bound),
        Text(verdict, style=_STYLES[check.verdict]),
    )


def _noise_cell(noise: Noise | None) -> str:
    sizes = () if noise is None else (noise.rms, noise.max)
    return " / ".join(f"{size:.0f}" if 10 <= size < 1e4 else f"{size:.2g}" for size in sizes)


def _size_cell(check: Check, number: float | None) -> str:
    if number is None:
        return ""
    if check.torch_noise is not None:
        return f"× {number:.3g}"
    return f"{number:.1e}" if number else "equal"


def _worst_of_parts(checks: Sequence[Check]) -> list[tuple[str, Check]]:
    """Return rows and their names: each that is wrong by itself, and of each part the worst of those that are alike."""
    rows = []
    for part, group in groupby(checks, key=lambda check: part_of(check.name)):
        members = list(group)
        wrong = [check for check in members if check.verdict in ("mismatch", "not-run")]
        rows += [(check.name, check) for check in wrong if check.view != PROPAGATED]
        propagated = [check for check in wrong if check.view == PROPAGATED]  # something before them is wrong
        passing = [check for check in members if check.verdict == "pass"]
        zeros = [check for check in members if check.verdict == "zero"]
        for alike in filter(None, (propagated, passing, zeros)):
            worst = max(alike, key=lambda check: check.measured or 0.0)
            rows.append((f"{part} ({len(alike)})" if len(alike) > 1 else worst.name, worst))
    return rows


def part_of(name: str) -> str:
    """Return the part of the model that a tensor belongs to, as in "network.0", with the optimizer if there is one."""
    optimizer, colon, tensor = name.rpartition(": ")
    first, *rest = tensor.split(".")
    numbered = rest and rest[0].isdigit()
    return optimizer + colon + (f"{first}.{rest[0]}" if numbered else first)
