"""`outlook inspect`: what a checkpoint holds, or in what two of them differ."""

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from outlook_common.text import listed, printable
from outlook_common.weights.checkpoint import Checkpoint, open_checkpoint
from outlook_common.weights.inspection import Difference, Inspection, Row, differences, inspect_checkpoint
from outlook_parity.cli.exit_codes import MISMATCH


def inspect(
    file: Annotated[str, typer.Argument(help="A file, a folder or a Hub id.", show_default=False)],
    other: Annotated[
        str | None, typer.Argument(help="Another, to show what differs.", show_default="none, show FILE")
    ] = None,
    prefix: Annotated[str, typer.Option(help="Look at what lies below this name only.")] = "",
    use_ema: Annotated[bool, typer.Option("--use-ema", help="Look at the averaged weights of a checkpoint.")] = False,
    manifest: Annotated[
        bool,
        typer.Option("--manifest", help="Print the SHA-256 of every tensor, as PyTorch would have it."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show the model, naming, tensors, statistics and hashes of a checkpoint, or in what two of them differ.

    Two checkpoints may be in any two formats and namings: tensors are compared as PyTorch would have them. Random
    streams and rates of stochastic depth are no weights: they are listed and not compared.

    Exit codes: 0, for two checkpoints only if every bit agrees; 1 they differ, 2 error.
    """
    checkpoint = open_checkpoint(file, prefix=prefix, use_ema=use_ema)
    if other is not None:
        _compare(checkpoint, open_checkpoint(other, prefix=prefix, use_ema=use_ema), as_json=as_json)
        return
    found = inspect_checkpoint(checkpoint)
    if as_json:
        typer.echo(json.dumps(_to_dict(found)))
    elif manifest:
        for line in found.manifest:
            typer.echo(printable(line))
    else:
        _print(found)


def _to_dict(found: Inspection) -> dict[str, Any]:
    return {
        "file": found.label,
        "prefix": found.prefix,
        "sha256": found.sha256,
        "weights_sha256": found.weights_sha256,
        "model": found.model and found.model.table.model,
        "sizes": found.model.sizes if found.model else {},
        "naming": found.naming,
        "prefixes": found.prefixes,
        "metadata": found.metadata,
        "not_weights": found.not_weights,
        "tensors": [_row_to_dict(row) for row in found.rows],
    }


def _row_to_dict(row: Row) -> dict[str, Any]:
    about = {"name": row.name, "dtype": row.dtype, "shape": row.shape}
    if row.statistics is None or row.line is None:
        return about
    return about | row.statistics.to_dict() | {"torch_name": row.line.name, "sha256": row.line.sha256}


def _print(found: Inspection) -> None:
    console = Console()
    console.print(f"[bold]{escape(found.label)}[/]", highlight=False)
    lines = {"model": found.model.table.model if found.model else "not known", "naming": found.naming or "not known"}
    if found.model:
        lines["sizes"] = ", ".join(f"{name}={size}" for name, size in found.model.sizes.items())
    if found.prefixes:
        lines["known models with --prefix"] = ", ".join(map(printable, found.prefixes))
    lines |= {f"metadata {printable(name)}": printable(value) for name, value in found.metadata.items()}
    if found.sha256:
        lines["sha256 of the file"] = found.sha256
    lines["sha256 of the weights"] = found.weights_sha256
    if found.not_weights:
        lines[f"not weights ({len(found.not_weights)})"] = listed(found.not_weights)
    for name, text in lines.items():
        console.print(escape(f"{name}: {text}"), highlight=False, soft_wrap=True)
    console.print(_table(found))


def _table(found: Inspection) -> Table:
    table = Table()
    # Names and numbers that are cut short are of no use.
    for column in ("name", "dtype", "shape"):
        table.add_column(column, overflow="fold")
    for column in ("NaN", "Inf", "zeros", "min", "max", "mean", "std"):
        table.add_column(column, justify="right", overflow="fold")
    table.add_column("sha256", overflow="fold")
    for row in found.rows:
        name, shape = escape(printable(row.name)), "×".join(map(str, row.shape)) or "scalar"
        if row.statistics is None or row.line is None:
            table.add_row(name, escape(printable(row.dtype)))
            continue
        of = row.statistics
        numbers = (f"{x:.3g}" if x is not None else "" for x in (of.smallest, of.largest, of.mean, of.deviation))
        counts = (str(count) for count in (of.nan, of.inf, of.zeros))
        style = "red" if of.nan or of.inf else None
        table.add_row(name, row.dtype, shape, *counts, *numbers, row.line.sha256[:12], style=style)
    return table


def _compare(a: Checkpoint, b: Checkpoint, *, as_json: bool) -> None:
    found = differences(a, b)
    if as_json:
        told = {
            "a": a.label,
            "b": b.label,
            "same": not found,
            "differences": [asdict(item) for item in found],
            "not_weights": {"a": a.not_weights, "b": b.not_weights},
        }
        typer.echo(json.dumps(told))
    else:
        _print_comparison(a, b, found)
    if found:
        raise typer.Exit(MISMATCH)


def _print_comparison(a: Checkpoint, b: Checkpoint, found: list[Difference]) -> None:
    console = Console()
    if found:
        console.print(_table_of_differences(a, b, found))
    else:
        console.print(f"every bit of {len(a.items)} tensors is the same", highlight=False)
    for which, names in (("A", a.not_weights), ("B", b.not_weights)):
        if names:
            line = f"not weights in {which} ({len(names)}), not compared: {listed(names)}"
            console.print(escape(line), highlight=False, soft_wrap=True)


def _table_of_differences(a: Checkpoint, b: Checkpoint, found: list[Difference]) -> Table:
    table = Table(title=escape(f"A = {a.label}, B = {b.label}"), title_justify="left")
    table.add_column("name", overflow="fold")
    table.add_column("differs in")
    table.add_column("how", overflow="fold")
    for item in found:
        table.add_row(escape(printable(item.name)), item.kind, escape(printable(item.detail)))
    return table
