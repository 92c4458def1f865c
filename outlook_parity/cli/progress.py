"""The progress bar of every command."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn


@contextmanager
def progress_bar(
    description: str, *columns: ProgressColumn, total: float | None = None, hidden: bool = False
) -> Iterator[Callable[..., None]]:
    """Show one bar on stderr if that is a terminal, else nothing.

    Args:
        description: what is being done.
        columns: what to show behind the bar; by default the time elapsed.
        total: how many steps there are; None if not known yet.
        hidden: show nothing on a terminal either.

    Yields:
        `rich.progress.Progress.update` of this bar: it takes completed=, total=, advance=, description=.
    """
    console = Console(stderr=True)
    shown = (TextColumn("{task.description}"), BarColumn(), *(columns or (TimeElapsedColumn(),)))
    with Progress(*shown, console=console, transient=True, disable=hidden or not console.is_terminal) as bar:
        yield partial(bar.update, bar.add_task(description, total=total))
