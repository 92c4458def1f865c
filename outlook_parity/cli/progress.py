"""Progress of a command on stderr: a bar on a terminal; where there is none, a line per step or long wait."""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn

_LONG = 1.0  # second: a shorter wait is not told


@contextmanager
def progress_bar(
    description: str, *columns: ProgressColumn, total: float | None = None, hidden: bool = False
) -> Iterator[Callable[..., None]]:
    """Show one bar on stderr if that is a terminal, else a line once it has taken a second.

    Args:
        description: what is being done.
        columns: what to show behind the bar; by default the time elapsed.
        total: how many steps there are; None if not known yet.
        hidden: show nothing.

    Yields:
        `rich.progress.Progress.update` of this bar: it takes completed=, total=, advance=, description=.
    """
    console = Console(stderr=True)
    if not hidden and not console.is_terminal:
        with _told_if_long(description):
            yield lambda **_: None
        return
    shown = (TextColumn("{task.description}"), BarColumn(), *(columns or (TimeElapsedColumn(),)))
    with Progress(*shown, console=console, transient=True, disable=hidden) as bar:
        yield partial(bar.update, bar.add_task(description, total=total))


@contextmanager
def _told_if_long(description: str) -> Iterator[None]:
    timer = threading.Timer(_LONG, _log, [description])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def waiting(description: str, *, quiet: bool = False) -> Iterator[None]:
    """Tell on stderr what a command waits for: a bar on a terminal, else a line once it has taken a second."""
    with downloads(quiet=quiet), progress_bar(description, hidden=quiet):
        yield


@contextmanager
def steps(description: str, *, quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar on stderr if that is a terminal, else a line per step, with the seconds so far.

    Args:
        description: what is done before the first step.
        quiet: show nothing.

    Yields:
        A function to call before each step, and once after the last: with what it is, how many are done, and how many
        there are; see `outlook_parity.core.plan.Progress`.
    """
    if quiet or Console(stderr=True).is_terminal:
        columns = (MofNCompleteColumn(), TimeElapsedColumn())
        with downloads(quiet=quiet), progress_bar(description, *columns, hidden=quiet) as update:
            yield lambda what, done, total: update(description=what, completed=done, total=total)
        return
    started = time.monotonic()

    def line(what: str, done: int, total: int) -> None:
        _log(f"[{done:>{len(str(total))}}/{total}] {time.monotonic() - started:6.1f} s  {what or 'done'}")

    _log(description)
    with downloads():
        yield line


@contextmanager
def downloads(*, quiet: bool = False) -> Iterator[None]:
    """Tell on stderr what is downloaded from the Hub: by its library's bars on a terminal, else by a line per file."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    log, handler, bars = logging.getLogger("outlook_common.hub"), _Lines(), not are_progress_bars_disabled()
    level = log.level
    terminal = Console(stderr=True).is_terminal
    if bars and (quiet or not terminal):
        disable_progress_bars()
    if not quiet and not terminal:
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        if bars:
            enable_progress_bars()


class _Lines(logging.Handler):
    """Writes each record as a line on stderr, as it is at that time."""

    def emit(self, record: logging.LogRecord) -> None:
        _log(record.getMessage())


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
