"""`outlook convert`: weights from one naming, layout and file format to another."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import DownloadColumn, TimeRemainingColumn
from rich.table import Table

from outlook_common.text import listed, printable
from outlook_common.weights import Conversion
from outlook_common.weights import convert as convert_weights
from outlook_common.weights.identify import LAYER
from outlook_parity.cli.help import epilog
from outlook_parity.cli.options import VARIANTS, AsJson, Manifest, Quiet, UseEma
from outlook_parity.cli.progress import downloads, progress_bar

EPILOG = epilog(
    "outlook convert volo.pth volo.safetensors",
    "outlook convert timm/volo_d1_224.sail_in1k volo.npz --to flax",
    "outlook convert own.pth own.safetensors --config own.toml",
    "outlook convert volo.pth layer.npz --prefix network.0.0.attn",
)

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmg]?)b?", re.IGNORECASE)
_MAX_NAMES = 20  # of each kind of left-out names; --json has them all


def convert(
    src: Annotated[str, typer.Argument(help="What to read: a file, a folder or a Hub id.", show_default=False)],
    dst: Annotated[str, typer.Argument(help="The file to write; its suffix is the format.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option(help=f"{LAYER}, {VARIANTS}.", show_default="what the tensors show"),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="TOML or JSON with the fields of a VOLO of own sizes.", show_default="what metadata or tensors show"
        ),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(help="Names to write: torch, flax or external-attention.", show_default="the other twin's"),
    ] = None,
    prefix: Annotated[str, typer.Option(help="Where the model lies in SRC: network.0.0.attn")] = "",
    dtype: Annotated[
        str | None, typer.Option(help="Cast to float16, bfloat16, float32 or float64.", show_default="keep every bit")
    ] = None,
    use_ema: UseEma = False,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Write what there is, and list missing tensors.")
    ] = False,
    ignore_unexpected: Annotated[
        bool, typer.Option("--ignore-unexpected", help="Leave out, and list, what the model does not have.")
    ] = False,
    max_shard_size: Annotated[
        str | None,
        typer.Option(help="Write a folder of .safetensors files up to this size: 2GB", show_default="one file"),
    ] = None,
    manifest: Manifest = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Convert weights between PyTorch and Flax, bit by bit.

    Formats: .safetensors, .npz, .msgpack; .pth, .pt, .pth.tar, .bin, .ckpt
    and, to write, .dcp need PyTorch, .orbax needs JAX; .h5 is read, and
    needs h5py.

    Everything wrong with the weights is reported at once, and then nothing
    is written. DST is replaced only once the new file has been read back
    equal.

    Exit codes: 0 written, 2 error.
    """
    size = None if max_shard_size is None else _bytes(max_shard_size)
    bar = progress_bar(f"converting {src} to {dst}", DownloadColumn(), TimeRemainingColumn(), hidden=quiet)
    with downloads(quiet=quiet), bar as update:
        done = convert_weights(
            src,
            dst,
            model=model,
            config=config,
            to=to,
            prefix=prefix,
            dtype=dtype,
            use_ema=use_ema,
            allow_missing=allow_missing,
            ignore_unexpected=ignore_unexpected,
            max_shard_size=size,
            manifest=manifest,
            progress=lambda done, total: update(completed=done, total=total),
        )
    if as_json:
        typer.echo(json.dumps(done.to_dict()))
        return
    console = Console()
    console.print(_table(done))
    for what, names in (("missing", done.missing), ("not weights", done.not_weights), ("ignored", done.ignored)):
        if names:
            left_out = escape(listed(names, _MAX_NAMES))
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
        raise ValueError(f"--max-shard-size must be a size in bytes, kB, MB or GB, such as 2GB; got {size!r}")
    return int(float(match[1]) * _UNITS[match[2].lower()])
