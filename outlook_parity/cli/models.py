"""`outlook models`: the released models, by pattern and size."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from outlook_common.models import ReleasedModel, list_models, released_models
from outlook_parity.cli.help import epilog
from outlook_parity.cli.options import AsJson

EPILOG = epilog(
    "outlook models",
    "outlook models '*_224' --max-params 60",
    "outlook models --min-top1 86 --json",
)


def models(
    pattern: Annotated[
        list[str] | None,
        typer.Argument(help="Names or Hub ids with * and ?: 'volo_d1*'.", show_default="all"),
    ] = None,
    img_size: Annotated[int | None, typer.Option(help="Side of the images in pixels.", show_default="any")] = None,
    max_params: Annotated[float | None, typer.Option(help="Million parameters at most.", show_default="any")] = None,
    max_flops: Annotated[
        float | None, typer.Option(help="Billion multiply-adds of one image at most.", show_default="any")
    ] = None,
    min_top1: Annotated[
        float | None, typer.Option(help="Published top-1 accuracy in percent at least.", show_default="any")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the released models: sizes, cost, accuracy, where the weights are.

    Parameters and multiply-adds ("FLOPs" in the paper) are counted from
    the configurations; the accuracy is the published one.

    Exit codes: 0 some match, 2 error (also if none matches).
    """
    names = list_models(
        pattern or "*",
        img_size=img_size,
        max_parameters=None if max_params is None else max_params * 1e6,
        max_multiply_adds=None if max_flops is None else max_flops * 1e9,
        min_top1=min_top1,
    )
    rows = [model for model in released_models() if model.name in names]
    if not rows:
        raise ValueError(f"no released model matches; there are {', '.join(list_models())}")
    if as_json:
        typer.echo(json.dumps([row.to_dict() for row in rows]))
    else:
        Console().print(_table(rows))


def _table(rows: list[ReleasedModel]) -> Table:
    licenses = ", ".join(sorted({row.license for row in rows}))
    table = Table(caption=f"licence of the weights: {licenses}", caption_justify="left")
    table.add_column("name", no_wrap=True)
    for column in ("params", "FLOPs", "px", "top-1"):
        table.add_column(column, justify="right")
    table.add_column("Hub id", overflow="fold")
    for row in rows:
        numbers = (
            f"{row.parameters / 1e6:.1f}M",
            f"{row.multiply_adds / 1e9:.1f}G",
            str(row.img_size[0]),
            f"{row.top1}%",
        )
        table.add_row(row.name, *numbers, row.hub_id)
    return table
