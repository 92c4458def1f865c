"""Report on a terminal or in a pipe: a summary, or every row. No line breaks a name."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby

from rich.console import Console
from rich.text import Text

from outlook_common.text import printable
from outlook_parity.core.check import Check, Noise, RowVerdict
from outlook_parity.diagnose.advice import advice
from outlook_parity.report.report import Report, sentence
from outlook_parity.report.summary import differing, lines, share_of_bound
from outlook_parity.report.text import finding, shortened, shortened_name, wrapped

MAX_DIFFERENCES = 5  # of rows, hyperparameters and notes; -v has them all

_LEAST_WIDTH = 60  # narrower tables hold no name

_VIEWS = {"torch": "on torch's input", "jax": "on jax's input"}

_STYLES = {"pass": "green", "zero": "yellow", "skipped": "yellow", "mismatch": "bold red", "not-run": "yellow"}

_WORDS = {"mismatch": "MISMATCH", "not-run": "NOT RUN"}

_COUNTED: dict[RowVerdict, str] = {
    "pass": "pass",
    "mismatch": "differ",
    "not-run": "not run",
    "skipped": "skipped",
    "zero": "zero in both",
}

_HEADS = ("level", "dtype", "verdict", "rows", "of bound", "worst row")

_LEGEND = (
    "torch noise, jax noise: error against the float64 truth in units of rounding, RMS / largest",
    "found: relative error in float64, else the factor (×) between the noises; small ones are equal",
    "on torch's input, on jax's input: the module isolated, on the input that twin has there",
)

_LOOK_CLOSER = "-v shows every row and its metrics"

_LABEL = "  {:<8}"  # of a line of the first difference


def print_report(report: Report, console: Console, *, title: str = "", verbose: bool = False) -> None:
    """Print a summary, or with `verbose` every row; the last line is the verdict in words, whole unless on a terminal.

    Args:
        report: what was found.
        console: its width counts, 80 in a pipe.
        title: what was compared.
        verbose: print every row with its metrics and its note, all notes, and each twin's difference from itself.
    """
    printed = _Printed(console)
    if title:
        printed.paragraph(title, style="bold")
    if report.checks:
        printed.line()
        for text, style in _every_row(report, printed.width) if verbose else _table(report.checks, printed.width):
            printed.line(text, style)
        printed.line()
    if report.verdict == "mismatch":
        for text, style in _what_differs(report, printed.width):
            printed.line(text, style)
        printed.line()
    if report.checks:
        printed.paragraph(_counted(report.checks))
    for note in _notes(report, verbose):
        printed.paragraph(f"note: {shortened(note)}", style="yellow", rest="  ")
    verdict = sentence(report)
    if console.is_terminal:
        printed.paragraph(verdict, style=_STYLES[report.verdict])
    else:  # a pipe has no width: one line, for `tail -1`
        printed.line(" ".join(verdict.split()), _STYLES[report.verdict])


class _Printed:
    """Lines on a console as they are: no markup, no line breaks of its own; ASCII where there is no more."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._ascii = not console.encoding.lower().startswith("utf")
        self.width = max(console.width, _LEAST_WIDTH)

    def line(self, text: str = "", style: str = "") -> None:
        if self._ascii:
            text = text.replace("…", "...").replace("×", "x")
        self._console.print(Text(text, style=style), soft_wrap=True, highlight=False)

    def paragraph(self, text: str, *, style: str = "", rest: str = "") -> None:
        for one in wrapped(text, self.width, rest=rest):
            self.line(one, style)


Styled = tuple[str, str]  # a line and its style


def _table(checks: Sequence[Check], width: int) -> Iterator[Styled]:
    """Yield a line per level and precision."""
    summary = lines(checks)
    cells = [
        (
            line.level,
            line.dtype,
            _WORDS.get(line.verdict, line.verdict),
            f"{line.differing}/{line.rows}" if line.differing else f"{line.rows}",
            "" if line.worst is None else _share_cell(line.worst),
        )
        for line in summary
    ]
    widths = [max(map(len, column)) for column in zip(_HEADS, *cells, strict=False)]
    left = width - sum(widths) - 2 * len(widths)
    yield _joined(_HEADS, widths, _HEADS[-1]), "bold"
    for row, line in zip(cells, summary, strict=True):
        worst = "" if line.worst is None or not share_of_bound(line.worst) else _named(line.worst, left)
        style = _STYLES[line.verdict] if line.verdict != "pass" else ""
        yield _joined(row, widths, worst), style


def _joined(cells: Sequence[str], widths: Sequence[int], last: str) -> str:
    """Return a line of a table: the first cells and the last to the left, numbers to the right."""
    padded = [
        cell.ljust(width) if index < 3 else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(cells, widths, strict=False))
    ]
    return "  ".join([*padded, last]).rstrip()


def _share_cell(check: Check) -> str:
    share = share_of_bound(check)
    if check.measured is None or not check.bound:
        return "equal" if share == 0 else ""
    return f"{share:.2g}" if share else "equal"


def _named(check: Check, width: int) -> str:
    """Return the name of a row, shortened to a width, with its view if there is room."""
    name = printable(check.name)
    view = _VIEWS.get(check.view, "")
    whole = f"{name}, {view}" if view else name
    return whole if len(whole) <= width else shortened_name(name, width)


def _what_differs(report: Report, width: int) -> Iterator[Styled]:
    """Yield the first difference in full, then more of them, and how many there are of each level."""
    rows = differing(report.checks, report.first_divergence, report.cause)
    if not rows:
        return
    first, *others = rows
    yield f"first of {len(rows)} rows that differ" if others else "the row that differs", "bold red"
    what = f"{first.level}, {first.dtype}: {printable(first.name)}"
    view = f", {_VIEWS[first.view]}" if first.view in _VIEWS else ""
    parts = {
        "what": f"{what}{view}: {finding(first)}",
        "effect": _effect(report.checks, first),
        "where": report.first_divergence or "not known: no module is wrong by itself",
        "why": report.cause or "not known: the numbers alone differ",
        "try": advice(report.cause or finding(first), report.first_divergence) or _LOOK_CLOSER,
    }
    for label, text in parts.items():
        if text:
            head = _LABEL.format(label)
            for line in wrapped(shortened(text), width, first=head, rest=" " * len(head)):
                yield line, ""
    if others:
        yield "others", "bold"
        yield from ((line, "") for line in _briefly(others[:MAX_DIFFERENCES], width))
    if left := Counter(f"{row.level}, {row.dtype}" for row in others[MAX_DIFFERENCES:]):
        groups = "; ".join(f"{count} {group}" for group, count in left.items())
        more = f"… and {left.total()} more: {groups}"
        yield from ((line, "") for line in wrapped(more, width, first="  ", rest="    "))


def _effect(checks: Iterable[Check], first: Check) -> str:
    """Return how far the outputs are apart, where the first difference is elsewhere."""
    outputs = [check for check in checks if check.level == "forward" and check.verdict == "mismatch" and check.metrics]
    if not outputs:
        return ""
    worst = max(outputs, key=share_of_bound)
    told = _predictions(worst.metrics or {})
    if worst is first:
        return told
    size = finding(worst)
    return "; ".join(filter(None, [f"{printable(worst.name)} in {worst.dtype}: {size}", told]))


def _predictions(metrics: Mapping[str, float]) -> str:
    """Return in words what a difference does to predictions."""
    parts = []
    if "KL mean" in metrics:
        parts.append(f"KL of the softmax {metrics['KL mean']:.1e}, at most {metrics['KL max']:.1e}")
    for name, share in metrics.items():
        if name.endswith(" agreement"):
            parts.append(f"{name.removesuffix(' agreement')} agrees in {share:.1%}")
    return ", ".join(parts)


def _briefly(rows: Sequence[Check], width: int) -> Iterator[str]:
    """Yield a line for each row; notes are cut, names shortened."""
    for row in rows:
        head = f"  {row.level}, {row.dtype}: "
        found = f"  {_size(row, row.measured)}" if row.measured is not None and not row.note else ""
        yield f"{head}{_named(row, width - len(head) - len(found))}{found}"


def _counted(checks: Sequence[Check]) -> str:
    """Return how many rows have which verdict."""
    found = Counter(check.verdict for check in checks)
    parts = (f"{found[verdict]} {word}" for verdict, word in _COUNTED.items() if found[verdict])
    return f"{len(checks)} rows: {', '.join(parts)}"


def _notes(report: Report, verbose: bool) -> list[str]:
    """Return the notes; of a report that passes also the first hyperparameters that differ."""
    most = None if verbose else MAX_DIFFERENCES
    notes = list(report.notes[:most])
    if left_out := len(report.notes) - len(notes):
        notes.append(f"… and {left_out} more notes")
    if report.verdict != "pass":  # a mismatch has them as its cause
        return notes
    notes += report.differences[:most]
    left_out = 0 if most is None else len(report.differences) - most
    return [*notes, f"… and {left_out} more such differences"] if left_out > 0 else notes


def _every_row(report: Report, width: int) -> Iterator[Styled]:
    """Yield every row under its level and precision, and the self-noise."""
    numbers = max((len(_numbers(check)) for check in report.checks), default=0)
    names = max(width - numbers - 2, 0)
    for (level, dtype), rows in groupby(report.checks, key=lambda check: (check.level, check.dtype)):
        yield f"{level}, {dtype}", "bold"
        for check in rows:
            name, view = f"  {printable(check.name)}", _VIEWS.get(check.view, "")
            style = _STYLES[check.verdict] if check.verdict != "pass" else ""
            whole = f"{name}, {view}" if view else name
            if len(whole) > names:
                yield name, style
                whole = f"    {view}"
            yield f"{whole:<{names}}  {_numbers(check)}".rstrip(), style
            for text in filter(None, (check.note, _metrics(check.metrics))):
                yield from ((line, style) for line in wrapped(shortened(text), width, first="    ", rest="    "))
    for text in _LEGEND:
        yield from ((line, "dim") for line in wrapped(text, width, rest="  "))
    if report.self_noise:
        yield "", ""
        yield "self-noise, before anything was compared: each twin against itself", "bold"
    for noise in report.self_noise:
        size = "equal" if not noise.measured else f"{noise.units:.2g} units"
        yield f"  {noise.twin}, {noise.dtype}, {noise.how}: {size}", ""


def _numbers(check: Check) -> str:
    """Return verdict, what was found, the bound, and the noises, each in its place."""
    cells = [f"{_WORDS.get(check.verdict, check.verdict):<8}", f"{_size(check, check.measured):>7}"]
    if check.measured is not None:
        cells.append(f"of {_size(check, check.bound):>7}" if check.bound else "")
    if check.torch_noise is not None and check.jax_noise is not None:
        cells.append(f"{_noise(check.torch_noise)}, {_noise(check.jax_noise)}")
    return " ".join(cells).rstrip()


def _noise(noise: Noise) -> str:
    return "/".join(f"{size:.0f}" if 10 <= size < 1e4 else f"{size:.2g}" for size in (noise.rms, noise.max))


def _size(check: Check, number: float | None) -> str:
    if number is None:
        return ""
    if check.torch_noise is not None:
        return f"×{number:.3g}"
    return f"{number:.1e}" if number else "equal"


def _metrics(metrics: Mapping[str, float] | None) -> str:
    return ", ".join(f"{name} {value:.2g}" for name, value in (metrics or {}).items() if value)
