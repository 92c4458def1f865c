"""`make bench`, or `python -m benchmarks layer --rounds 30 --case volo_d1`: time, and write the results."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from benchmarks import report
from benchmarks.timing import interleave
from parity_tests.cases import BY_NAME
from parity_tests.timm_oracle import declare_missing_torchvision_operators

LAYER_CASES = ("volo_d1", "volo_d2", "volo_d4", "seed_512", "seed_512_8_heads", "large_map", "small_map", "kernel_5")

Rounds = Annotated[int, typer.Option(help="Rounds; every contender runs once in each.")]
Out = Annotated[Path, typer.Option(help="Folder of the results.")]

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def layer(
    rounds: Rounds = 15,
    batch: Annotated[int, typer.Option(help="Batch size.")] = 4,
    case: Annotated[list[str] | None, typer.Option(help="Cases to time; all if none is given.")] = None,
    out: Out = report.FOLDER,
) -> None:
    """Time the layer: every implementation of both twins, timm, and the floor, interleaved in one run."""
    declare_missing_torchvision_operators()
    from benchmarks.layer import contenders  # imports timm

    timings: report.Timings = {}
    with Progress() as progress:
        for name in progress.track(case or LAYER_CASES, description="layer"):
            pairs = contenders(BY_NAME[name].with_batch(batch))
            timings[name] = {
                "forward": interleave({n: p.forward for n, p in pairs.items()}, rounds=rounds),
                "forward+backward": interleave({n: p.training for n, p in pairs.items()}, rounds=rounds),
            }
    report.write(out, "layer_cpu", report.layer(timings), timings)


@app.command()
def volo(
    rounds: Rounds = 7, batch: Annotated[int, typer.Option(help="Batch size.")] = 8, out: Out = report.FOLDER
) -> None:
    """Time whole models: compile time of the JAX twin's d1 and d5, forward time of d1 against timm."""
    declare_missing_torchvision_operators()
    from benchmarks.volo import compile_seconds, forward_seconds  # imports timm

    compiled = {
        variant: {
            "scanned": compile_seconds(variant, scan_layers=True),
            "unrolled": compile_seconds(variant, scan_layers=False),
        }
        for variant in ("volo_d1_224", "volo_d5_224")
    }
    forward = {"volo_d1_224": forward_seconds("volo_d1_224", batch=batch, rounds=rounds)}
    numbers = {"batch": batch, "compile": compiled, "forward": forward}
    report.write(out, "volo_cpu", report.volo(compiled, forward, batch), numbers)


@app.callback(invoke_without_command=True)
def everything(context: typer.Context) -> None:
    """Side-by-side timings against peers; without a command, all of them."""
    if context.invoked_subcommand is None:
        layer()
        volo()


app()
