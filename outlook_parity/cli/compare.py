"""`outlook compare`: the verdict on two traces, where neither framework is needed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from outlook_parity.cli.help import epilog
from outlook_parity.cli.options import ProgressOptions, ReportOptions, grouped
from outlook_parity.cli.output import finish
from outlook_parity.cli.progress import waiting

EPILOG = epilog(
    "outlook compare torch.trace jax.trace",
    "outlook compare torch.trace jax.trace --truth truth.trace",
    "outlook compare torch.trace jax.trace --html report.html",
)


@dataclass(frozen=True)
class TraceFiles:
    """The traces to compare."""

    one: Annotated[Path, typer.Argument(help="Trace of one twin.", show_default=False)]
    other: Annotated[Path, typer.Argument(help="Trace of the other twin.", show_default=False)]
    truth: Annotated[
        Path | None, typer.Option(help="For lower precisions: a float64 trace of the same rounded numbers.")
    ] = None


@grouped
def compare(traces: TraceFiles, progress: ProgressOptions, report: ReportOptions) -> None:
    """Compare two traces of `outlook trace`; no framework needed.

    Both must have the same inputs, weights, dtype and seed.

    Exit codes: 0 pass, 1 mismatch, 2 error, 3 nothing to compare.
    """
    from outlook_parity.trace.compare import compare_traces
    from outlook_parity.trace.file import read

    with waiting(f"comparing {traces.one} and {traces.other}", quiet=progress.quiet):
        truth = None if traces.truth is None else read(traces.truth)
        found = compare_traces(read(traces.one), read(traces.other), truth)
    finish(found, report, title=f"{traces.one.name} and {traces.other.name}")
