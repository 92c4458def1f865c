"""`outlook convert`: weights from one naming, layout and file format to another."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from outlook_common.config import VOLO_VARIANTS
from outlook_common.text import listed, printable
from outlook_common.weights import Conversion
from outlook_common.weights import convert as convert_weights
from outlook_common.weights.identify import LAYER

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmg]?)b?", re.IGNORECASE)
# How many names of what was left out are listed; all of them with --json.
_LISTED = 20


def convert(
    src: Annotated[str, typer.Argument(help="A file, a folder or a Hub id to read.", show_default=False)],
    dst: Annotated[str, typer.Argument(help="The file to write; its suffix decides the format.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option(help=f"{LAYER}, {', '.join(VOLO_VARIANTS)}.", show_default="what the tensors show"),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(help="The naming to write: torch, flax or external-attention.", show_default="the other twin's"),
    ] = None,
    prefix: Annotated[str, typer.Option(help="Where in SRC the model lies, as in network.0.0.attn.")] = "",
    dtype: Annotated[
        str | None, typer.Option(help="Cast to float16, bfloat16, float32 or float64.", show_default="keep every bit")
    ] = None,
    use_ema: Annotated[bool, typer.Option("--use-ema", help="Take the averaged weights of a checkpoint.")] = False,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Write what there is, and list what is not.")
    ] = False,
    ignore_unexpected: Annotated[
        bool, typer.Option("--ignore-unexpected", help="Leave out, and list, what the model has not.")
    ] = False,
    max_shard_size: Annotated[
        str | None,
        typer.Option(help="Make DST a folder of .safetensors of up to this size, as 2GB.", show_default="one file"),
    ] = None,
    manifest: Annotated[
        bool, typer.Option("--manifest", help="Print the SHA-256 of every tensor as PyTorch would have it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Convert weights between PyTorch and Flax, bit by bit; everything wrong with them is reported at once.

    DST, if it exists, is replaced, once the new file has been read back equal. Formats: .safetensors, .npz, .pth, .pt,
    .pth.tar, .bin, .ckpt (these need PyTorch) and .orbax, a folder (needs JAX).
    """
    with _progress() as progress:
        done = convert_weights(
            src,
            dst,
            model=model,
            to=to,
            prefix=prefix,
            dtype=dtype,
            use_ema=use_ema,
            allow_missing=allow_missing,
            ignore_unexpected=ignore_unexpected,
            max_shard_size=None if max_shard_size is None else _bytes(max_shard_size),
            manifest=manifest,
            progress=progress,
        )
    if as_json:
        typer.echo(json.dumps(done.to_dict()))
        return
    console = Console()
    console.print(_table(done))
    for what, names in (("missing", done.missing), ("not weights", done.not_weights), ("ignored", done.ignored)):
        if names:
            left_out = escape(listed(names, _LISTED))
            console.print(f"[yellow]{what} ({len(names)}):[/] {left_out}", highlight=False, soft_wrap=True)
    for line in done.manifest or ():
        typer.echo(printable(line))


def _table(done: Conversion) -> Table:
    table = Table("", title=done.model)
    for side in ("found", "written"):
        table.add_column(side, overflow="fold")
    source = done.source + (f", prefix {done.prefix}" if done.prefix else "")
    table.add_row("file", escape(source), escape(done.destination))
    table.add_row("naming", done.found_naming, done.written_naming)
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in done.dtypes.items())
    table.add_row("tensors", str(done.tensors + len(done.ignored)), f"{done.tensors}: {dtypes}")
    if done.source_sha256:
        table.add_row("sha256", done.source_sha256, "")
    return table


def _bytes(size: str) -> int:
    """Return how many bytes a size such as 2GB or 500 MB is."""
    match = _SIZE.fullmatch(size.strip())
    if match is None:
        raise ValueError(f"--max-shard-size must be a number of bytes, kB, MB or GB, as 2GB; got {size!r}")
    return int(float(match[1]) * _UNITS[match[2].lower()])


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal, and nothing elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("writing and reading back", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
