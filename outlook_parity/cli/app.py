"""The command line `outlook`. Each command imports what it needs when it runs.

Exit codes: see `outlook_parity.cli.exit_codes`.
"""

import sys
import traceback
from io import TextIOWrapper
from typing import Annotated

import typer

from outlook_common.version import __version__
from outlook_parity.cli import compare, convert, explain, inspect, models, predict, trace, verify
from outlook_parity.cli.exit_codes import ERROR
from outlook_parity.cli.help import epilog
from outlook_parity.cli.output import print_error
from outlook_parity.cli.pipes import ended_by_closed_pipe
from outlook_parity.core.memory import release_large_blocks
from outlook_parity.report.text import shortened

# What a user can get wrong, told in one line; anything else shows its traceback.
USER_ERRORS = (ValueError, TypeError, OSError, ImportError, NotImplementedError)

EPILOG = epilog(
    "outlook verify --model layer",
    "outlook convert timm/volo_d1_224.sail_in1k volo.npz",
    "outlook verify --help",
)
# The groups that the list of commands has.
PANELS = dict.fromkeys(("verify", "trace", "compare"), "Twins") | dict.fromkeys(("convert", "inspect"), "Weights")

app = typer.Typer(
    no_args_is_help=True,
    epilog=EPILOG,
    context_settings={"help_option_names": ["--help", "-h"]},
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for command, examples in (
    (verify.verify, verify.EPILOG),
    (trace.trace, trace.EPILOG),
    (compare.compare, compare.EPILOG),
    (convert.convert, convert.EPILOG),
    (inspect.inspect, inspect.EPILOG),
    (predict.predict, predict.EPILOG),
    (models.models, models.EPILOG),
    (explain.explain, explain.EPILOG),
):
    app.command(epilog=examples, rich_help_panel=PANELS.get(command.__name__, "Models"))(command)


def _print_version(asked: bool | None) -> None:
    if asked:
        typer.echo(f"outlook {__version__}")
        raise typer.Exit


@app.callback()
def outlook(
    version: Annotated[
        bool | None, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = None,
) -> None:
    """Outlook attention and VOLO in JAX and PyTorch: verify, convert, inspect, predict, explain."""


def main() -> None:
    """Run the command line; an error ends in exit code 2 and one line on stderr, behind its traceback if it is ours."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no error
    release_large_blocks()
    with ended_by_closed_pipe():
        _run()


def _run() -> None:
    try:
        app()
    except BrokenPipeError:
        raise
    except USER_ERRORS as error:
        print_error(shortened(_message(error)))
        raise SystemExit(ERROR) from error
    except Exception as error:  # else Python ends with exit code 1, which means that the twins differ
        traceback.print_exc()
        print_error(shortened(f"{type(error).__name__}: {error}"))
        raise SystemExit(ERROR) from error


def _message(error: Exception) -> str:
    """Return an error in words; of the operating system's the file first, without its number."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)
