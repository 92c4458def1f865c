"""The command line `outlook`. Each command imports what it needs when it runs.

Exit codes: 0 pass, 1 mismatch, 2 error (bad file, bad usage), 3 asked for and not run (no such device).
"""

import sys
from io import TextIOWrapper

import typer
from rich.console import Console
from rich.markup import escape

from outlook_parity.cli import compare, convert, inspect, predict, trace, verify
from outlook_parity.cli.exit_codes import ERROR

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
for command in (verify.verify, trace.trace, compare.compare, convert.convert, inspect.inspect, predict.predict):
    app.command()(command)


@app.callback()
def outlook() -> None:
    """Outlook attention and VOLO in JAX and PyTorch: verify that they agree, convert and inspect weights, predict."""


def main() -> None:
    """Run the command line; what a user can get wrong ends in one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # what a terminal cannot show is no error of what was done
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(ERROR) from error
