"""`outlook inspect`: the contents of a checkpoint, or the differences of two."""

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from outlook_common.text import listed, printable
from outlook_common.weights.checkpoint import Checkpoint, open_checkpoint
from outlook_common.weights.inspection import Difference, Inspection, Row, differences
from outlook_common.weights.inspection import inspect as inspect_weights
from outlook_parity.cli.exit_codes import MISMATCH
from outlook_parity.cli.help import epilog
from outlook_parity.cli.options import AsJson, Manifest, Quiet, UseEma
from outlook_parity.cli.progress import waiting

EPILOG = epilog(
    "outlook inspect volo.safetensors",
    "outlook inspect volo.pth volo.npz",
    "outlook inspect volo.pth --manifest",
)


def inspect(
    file: Annotated[str, typer.Argument(help="A file, a folder or a Hub id.", show_default=False)],
    other: Annotated[
        str | None, typer.Argument(help="A second one, to compare with.", show_default="none: show FILE")
    ] = None,
    prefix: Annotated[str, typer.Option(help="Show only what lies below this name.")] = "",
    use_ema: UseEma = False,
    manifest: Manifest = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show what a checkpoint holds, or compare two bit by bit.

    Of one: model, naming, and of every tensor its statistics and SHA-256.

    Of two: which tensors differ, and how. They may have different formats
    and namings: tensors are compared in PyTorch's layout. Random streams
    and rates of stochastic depth are listed, not compared.

    Exit codes: 0 (of two: every bit agrees), 1 they differ, 2 error.
    """
    if other is not None:
        with waiting(f"comparing {file} and {other}", quiet=quiet):
            a, b = (open_checkpoint(path, prefix=prefix, use_ema=use_ema) for path in (file, other))
            found = differences(a, b)
        _print_differences(a, b, found, as_json=as_json)
        return
    with waiting(f"reading {file}", quiet=quiet):
        inspection = inspect_weights(file, prefix=prefix, use_ema=use_ema)
    if as_json:
        typer.echo(json.dumps(_to_dict(inspection)))
    elif manifest:
        for line in inspection.manifest:
            typer.echo(printable(line))
    else:
        _print(inspection)


def _to_dict(inspection: Inspection) -> dict[str, Any]:
    return {
        "file": inspection.label,
        "prefix": inspection.prefix,
        "sha256": inspection.sha256,
        "weights_sha256": inspection.weights_sha256,
        "model": inspection.model and inspection.model.table.model,
        "sizes": inspection.model.sizes if inspection.model else {},
        "naming": inspection.naming,
        "prefixes": inspection.prefixes,
        "metadata": inspection.metadata,
        "not_weights": inspection.not_weights,
        "tensors": [_row_to_dict(row) for row in inspection.rows],
    }


def _row_to_dict(row: Row) -> dict[str, Any]:
    about = {"name": row.name, "dtype": row.dtype, "shape": row.shape}
    if row.statistics is None or row.checksum is None:
        return about
    return about | row.statistics.to_dict() | {"torch_name": row.checksum.name, "sha256": row.checksum.sha256}


def _print(inspection: Inspection) -> None:
    console = Console()
    console.print(f"[bold]{escape(inspection.label)}[/]", highlight=False)
    model = inspection.model
    lines = {"model": model.table.model if model else "not known", "naming": inspection.naming or "not known"}
    if model:
        lines["sizes"] = ", ".join(f"{name}={size}" for name, size in model.sizes.items())
    if inspection.prefixes:
        lines["known models with --prefix"] = ", ".join(map(printable, inspection.prefixes))
    lines |= {f"metadata {printable(name)}": printable(value) for name, value in inspection.metadata.items()}
    if inspection.sha256:
        lines["sha256 of the file"] = inspection.sha256
    lines["sha256 of the weights"] = inspection.weights_sha256
    if inspection.not_weights:
        lines[f"not weights ({len(inspection.not_weights)})"] = listed(inspection.not_weights)
    for name, text in lines.items():
        console.print(escape(f"{name}: {text}"), highlight=False, soft_wrap=True)
    console.print(_table(inspection))


def _table(inspection: Inspection) -> Table:
    table = Table()
    # Fold, never cut: a name or number that is cut short is of no use.
    for column in ("name", "dtype", "shape"):
        table.add_column(column, overflow="fold")
    for column in ("NaN", "Inf", "zeros", "min", "max", "mean", "std"):
        table.add_column(column, justify="right", overflow="fold")
    table.add_column("sha256", overflow="fold")
    for row in inspection.rows:
        name, shape = escape(printable(row.name)), "×".join(map(str, row.shape)) or "scalar"
        if row.statistics is None or row.checksum is None:
            table.add_row(name, escape(printable(row.dtype)))
            continue
        stats = row.statistics
        numbers = (
            f"{x:.3g}" if x is not None else "" for x in (stats.smallest, stats.largest, stats.mean, stats.deviation)
        )
        counts = (str(count) for count in (stats.nan, stats.inf, stats.zeros))
        style = "red" if stats.nan or stats.inf else None
        table.add_row(name, row.dtype, shape, *counts, *numbers, row.checksum.sha256[:12], style=style)
    return table


def _print_differences(a: Checkpoint, b: Checkpoint, found: list[Difference], *, as_json: bool) -> None:
    """Print what differs, and end the command with exit code 1 if anything does."""
    if as_json:
        summary = {
            "a": a.label,
            "b": b.label,
            "same": not found,
            "differences": [asdict(item) for item in found],
            "not_weights": {"a": a.not_weights, "b": b.not_weights},
        }
        typer.echo(json.dumps(summary))
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
