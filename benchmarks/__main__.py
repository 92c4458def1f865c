"""Command line of the benchmarks: `python -m benchmarks layer --rounds 30 --case volo_d1`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from benchmarks import report
from benchmarks.imports import measure, ratios
from benchmarks.memory import peak_megabytes
from benchmarks.timing import interleave
from benchmarks.torchvision_stub import declare_missing_torchvision_operators
from benchmarks.verify import ALL, CASES, LEVELS, Cost, cost
from outlook_common.op_cases import BY_NAME

LAYER_CASES = ("volo_d1", "volo_d2", "volo_d4", "seed_512", "seed_512_8_heads", "large_map", "small_map", "kernel_5")
MEMORY_CASES = ("volo_d1", "seed_512")

Rounds = Annotated[int, typer.Option(help="Timed runs of every contender, interleaved.")]
Out = Annotated[Path, typer.Option(help="Folder for the results.")]

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


Batch = Annotated[int, typer.Option(help="Batch size.")]


@app.command()
def layer(
    rounds: Rounds = 9,
    batch: Batch = 8,
    case: Annotated[list[str] | None, typer.Option(help="Case to time (repeatable). Default: all.")] = None,
    out: Out = report.FOLDER,
) -> None:
    """Layer: time and memory of every implementation, timm, and the matrix products alone."""
    declare_missing_torchvision_operators()
    from benchmarks.layer import compile_seconds, contenders, defaults  # imports timm

    measured: report.Layer = {}
    with Progress() as progress:
        for name in progress.track(case or LAYER_CASES, description="layer"):
            sized = BY_NAME[name].with_batch(batch)
            pairs = {contender: make() for contender, make in contenders(sized).items()}
            measured[name] = {
                "forward": interleave({n: p.forward for n, p in pairs.items()}, rounds=rounds),
                "forward+backward": interleave({n: p.training for n, p in pairs.items()}, rounds=rounds),
                "default": defaults(sized),
                "compile": compile_seconds(sized),
                "memory": {n: peak_megabytes(sized, n) for n in pairs if name in MEMORY_CASES and "compiled" not in n},
            }
    report.write(out, "layer_cpu", report.layer(measured, batch), {"batch": batch, "cases": measured})


@app.command()
def scaling(rounds: Rounds = 5, out: Out = report.FOLDER) -> None:
    """Layer: training steps on growing maps, batches, channels and kernels, with a plot."""
    declare_missing_torchvision_operators()
    from benchmarks.layer import contenders  # imports timm
    from benchmarks.scaling import NAMES, cases, plot

    seconds: dict[str, dict[int, dict[str, float]]] = {}
    with Progress() as progress:
        for axis, size, sized in progress.track(list(cases()), description="scaling"):
            made = contenders(sized)
            runs = {name: made[name]().training for name in NAMES}
            seconds.setdefault(axis, {})[size] = interleave(runs, rounds=rounds)
    report.write(out, "scaling_cpu", report.scaling(seconds), seconds)
    plot(out / "scaling_cpu.svg", seconds)


@app.command()
def volo(rounds: Rounds = 7, batch: Batch = 8, out: Out = report.FOLDER) -> None:
    """VOLO: forward and training step of d1 against timm; JAX compile time of d1 and d5."""
    declare_missing_torchvision_operators()
    from benchmarks.volo import compile_seconds, contenders  # imports timm

    compiled = {
        variant: {
            "scanned": compile_seconds(variant, scan_layers=True),
            "unrolled": compile_seconds(variant, scan_layers=False),
        }
        for variant in ("volo_d1_224", "volo_d5_224")
    }
    pairs = contenders("volo_d1_224", batch)
    timings = {
        "forward": interleave({n: p.forward for n, p in pairs.items()}, rounds=rounds, untimed=1),
        "training step": interleave({n: p.training for n, p in pairs.items() if p.training}, rounds=rounds, untimed=1),
    }
    numbers = {"batch": batch, "compile": compiled, "volo_d1_224": timings}
    report.write(out, "volo_cpu", report.volo(compiled, timings, batch), numbers)


@app.command()
def verify(
    case: Annotated[list[str] | None, typer.Option(help="Pair to verify (repeatable). Default: all.")] = None,
    level: Annotated[list[str] | None, typer.Option(help="Level (repeatable). Default: each, and all.")] = None,
    out: Out = report.FOLDER,
) -> None:
    """Verifier: processor time and peak memory of each level."""
    measured: dict[str, dict[str, Cost]] = {}
    with Progress() as progress:
        runs = [(name, one) for name in case or CASES for one in level or (*LEVELS, ALL)]
        for name, one in progress.track(runs, description="verify"):
            measured.setdefault(name, {})[one] = cost(name, one)
    numbers = {name: {one: asdict(found) for one, found in of.items()} for name, of in measured.items()}
    report.write(out, "verify_cpu", report.verify(numbers), numbers)


@app.command()
def imports(rounds: Rounds = 9, out: Out = report.FOLDER) -> None:
    """Start-up: import of each twin against its framework's, and of the command line."""
    measured = measure(rounds)
    numbers = {name: asdict(seconds) for name, seconds in measured.items()}
    report.write(out, "imports_cpu", report.imports(measured, ratios(measured)), numbers)


@app.command()
def sharded(out: Out = report.FOLDER) -> None:
    """Compile time of a training step of VOLO-D1 on eight simulated devices against one."""
    from benchmarks.sharded_compile import STEPS, measure

    found = {f"{rules}, {devices}": measure(rules, devices) for rules, devices in STEPS}
    report.write(out, "sharded_compile_cpu", report.sharded(found), found)


@app.command()
def plan(
    batch: Annotated[int, typer.Option(help="Images of all devices together.")] = 1024,
    size: Annotated[int, typer.Option(help="Pixels of a side: 224, or what d1 to d5 were released for.")] = 224,
) -> None:
    """Memory and communication of a training step of d1 to d5 on v5e-256 and 64 H100, by arithmetic."""
    from benchmarks.plan import plans

    print(report.plan(plans(batch, size)))


@app.callback(invoke_without_command=True)
def everything(context: typer.Context) -> None:
    """Time outlook attention and VOLO against peers, and the verifier. Without a command, run all that is timed."""
    if context.invoked_subcommand is None:
        layer()
        scaling()
        volo()
        verify()
        imports()
        sharded()


app()
