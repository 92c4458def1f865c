"""Output that nobody reads any more, as of `outlook … | head`."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from outlook_parity.cli.exit_codes import ERROR


@contextmanager
def ended_by_closed_pipe() -> Iterator[None]:
    """End the process quietly by SIGPIPE, as other tools do, if output cannot be written since its reader is gone.

    Not by restoring the signal's default at the start: connections to the Hub that break would end the process too.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BaseException as error:
        # Rich and Click turn it into exit code 1, which means that the twins differ.
        if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
            raise
        _end()


def _end() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)  # for what is still in buffers
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGPIPE)
    raise SystemExit(ERROR)
