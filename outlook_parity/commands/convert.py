"""`outlook convert`: weights from one naming, layout and file format to another."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from outlook_common.weights import convert as convert_weights


def convert(
    src: Annotated[Path, typer.Argument(help="The file to read.", show_default=False)],
    dst: Annotated[Path, typer.Argument(help="The file to write; its suffix decides the format.", show_default=False)],
    to: Annotated[
        str | None,
        typer.Option(help="The naming to write: torch, flax or external-attention.", show_default="the other twin's"),
    ] = None,
    prefix: Annotated[str, typer.Option(help="Where in SRC the model lies, as in network.0.0.attn.")] = "",
    use_ema: Annotated[bool, typer.Option("--use-ema", help="Take the averaged weights of a checkpoint.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Convert weights between PyTorch and Flax, bit by bit; everything wrong with them is reported at once.

    DST, if it exists, is replaced, once the new file has been read back equal.
    """
    done = convert_weights(src, dst, to=to, prefix=prefix, use_ema=use_ema)
    if as_json:
        typer.echo(json.dumps(done.to_dict()))
        return
    table = Table("", title=done.model)
    for side in ("found", "written"):
        table.add_column(side, overflow="fold")
    source = done.source + (f", prefix {done.prefix}" if done.prefix else "")
    table.add_row("file", escape(source), escape(done.destination))
    table.add_row("naming", done.found_naming, done.written_naming)
    table.add_row("tensors", str(done.tensors), str(done.tensors))
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in done.dtypes.items())
    table.add_row("dtypes", dtypes, dtypes)
    Console().print(table)
