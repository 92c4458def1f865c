"""`outlook inspect`: what a file of weights holds."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from outlook_common.weights.arrays import is_floating, to_numpy
from outlook_common.weights.checkpoint import open_checkpoint
from outlook_common.weights.convert import recognisable_prefixes, recognise_checkpoint
from outlook_common.weights.resolve import naming_of


@dataclass(frozen=True)
class Row:
    """One tensor of a file; `dtype` says what it is instead where it is none."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nan: int
    inf: int


def inspect(
    file: Annotated[Path, typer.Argument(help="A file of weights.", show_default=False)],
    prefix: Annotated[str, typer.Option(help="Look at what lies below this name only.")] = "",
    use_ema: Annotated[bool, typer.Option("--use-ema", help="Look at the averaged weights of a checkpoint.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show the model, naming, names, dtypes and shapes in a file, and count what is NaN or infinite."""
    checkpoint = open_checkpoint(file, prefix=prefix, use_ema=use_ema)
    model = recognise_checkpoint(checkpoint)
    rows = [_row(name, value) for name, value in checkpoint.items]
    prefixes = recognisable_prefixes(checkpoint)
    found: dict[str, Any] = {
        "file": checkpoint.label,
        "prefix": checkpoint.prefix,
        "model": model and model.table.model,
        "sizes": model.sizes if model else {},
        "naming": model and naming_of(checkpoint.names, model.table),
        "prefixes": prefixes,
    }
    if as_json:
        typer.echo(json.dumps(found | {"tensors": [asdict(row) for row in rows]}))
        return
    console = Console()
    console.print(f"[bold]{escape(checkpoint.label)}[/]", highlight=False)
    for what in ("model", "naming"):
        console.print(f"{what}: {found[what] or 'not known'}", highlight=False)
    if model:
        console.print("sizes: " + ", ".join(f"{name}={size}" for name, size in model.sizes.items()), highlight=False)
    if prefixes:
        console.print(f"known models with --prefix: {', '.join(map(escape, prefixes))}", highlight=False)
    table = Table()
    table.add_column("name", overflow="fold")  # a name that is cut short is of no use
    table.add_column("dtype")
    table.add_column("shape")
    table.add_column("NaN", justify="right")
    table.add_column("Inf", justify="right")
    for row in rows:
        style = "red" if row.nan or row.inf else None
        shape = "×".join(map(str, row.shape)) or "scalar"
        table.add_row(escape(row.name), escape(row.dtype), shape, str(row.nan), str(row.inf), style=style)
    console.print(table)


def _row(name: str, value: Any) -> Row:
    try:
        array = to_numpy(value)
    except TypeError:
        return Row(name, f"not numbers: {type(value).__name__}", (), 0, 0)
    if not is_floating(array):
        return Row(name, array.dtype.name, array.shape, 0, 0)
    with np.errstate(invalid="ignore"):  # looking at a signalling NaN of bfloat16 sets it off
        nan, inf = (int(np.count_nonzero(test(array))) for test in (np.isnan, np.isinf))
    return Row(name, array.dtype.name, array.shape, nan, inf)
