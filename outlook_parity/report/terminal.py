"""A report as tables on a terminal."""

from collections.abc import Sequence
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from outlook_parity.core.check import PROPAGATED, Check, Noise, SelfNoise
from outlook_parity.report.report import Report, sentence

# How many of the differences that change no number are printed.
NOTES = 5

ALONE = {"torch": " (alone, torch's)", "jax": " (alone, jax's)"}

_STYLES = {"pass": "green", "zero": "yellow", "skipped": "yellow", "mismatch": "bold red", "not-run": "yellow"}


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
        if (left_out := len(report.differences) - NOTES) > 0:
            console.print(Text(f"note: … and {left_out} more such differences", style="yellow"))
    console.print(Text(sentence(report), style=_STYLES[report.verdict]), soft_wrap=True)


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
