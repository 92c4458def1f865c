"""`outlook compare`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from outlook_parity.cli.exit_codes import OF_VERDICTS


def compare(
    one: Annotated[Path, typer.Argument(help="A trace of either framework.", show_default=False)],
    other: Annotated[Path, typer.Argument(help="A trace of the other.", show_default=False)],
    truth: Annotated[
        Path | None, typer.Option(help="In lower precisions: a trace in float64 of the same rounded numbers.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML page.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write the report as JUnit XML, for CI.")] = None,
    show_all: Annotated[bool, typer.Option("--all", help="Show every tensor, not the worst of each part.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, and nothing else.")] = False,
) -> None:
    """Compare two traces that `outlook trace` wrote, on a machine that needs neither framework.

    Refused are traces of other inputs, other weights, another dtype or another seed.

    Exit codes: 0 pass, 1 mismatch, 2 error, 3 nothing to compare.
    """
    from outlook_parity.report.terminal import show
    from outlook_parity.trace.compare import compare_traces
    from outlook_parity.trace.file import read

    report = compare_traces(read(one), read(other), None if truth is None else read(truth))
    title = f"{one.name} and {other.name}"
    if html is not None:
        report.to_html(html, title=title)
    if junit is not None:
        report.to_junit(junit)
    if as_json:
        typer.echo(report.to_json())
    else:
        show(report, Console(), title=title, every_row=show_all)
    raise typer.Exit(OF_VERDICTS[report.verdict])
