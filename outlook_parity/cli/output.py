"""What commands print: reports, notes, files that were written, errors."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.text import Text

from outlook_parity.cli.exit_codes import BY_VERDICT
from outlook_parity.cli.options import ReportOptions

if TYPE_CHECKING:
    from outlook_parity.report.report import Report


def finish(report: "Report", options: ReportOptions, *, title: str, picture: Path | None = None) -> None:
    """Write and print a report, and end the command with the exit code of its verdict.

    Args:
        report: what was found.
        options: where it goes.
        title: what was compared.
        picture: a file that was written already, to be named too.

    Raises:
        typer.Exit: always.
        OSError: a file cannot be written.
    """
    from outlook_parity.report.terminal import print_report

    if options.html is not None:
        report.to_html(options.html, title=title)
    if options.junit is not None:
        report.to_junit(options.junit)
    if options.as_json:
        typer.echo(report.to_json())
    else:
        print_report(report, Console(), title=title, verbose=options.verbose)
        for kind, path in (("page", options.html), ("JUnit", options.junit), ("picture", picture)):
            if path is not None:
                print_line(f"{kind}: {path}")
    raise typer.Exit(BY_VERDICT[report.verdict])


def print_line(text: str, *, style: str = "", stderr: bool = False) -> None:
    """Print one line as it is: no markup, no line breaks of its own."""
    Console(stderr=stderr).print(Text(text, style=style), soft_wrap=True)


def print_error(message: str, *, label: str = "error") -> None:
    """Print a red label and a message on stderr, without line breaks of its own."""
    Console(stderr=True).print(Text.assemble((f"{label}:", "bold red"), f" {message}"), soft_wrap=True)
