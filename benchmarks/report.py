"""Write results as Markdown tables and JSON."""

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.imports import Seconds

FOLDER = Path("benchmarks/results")
MEASURES = ("forward", "forward+backward")

# case -> measure -> contender -> median seconds, or megabytes, or a name
Layer = dict[str, dict[str, dict[str, Any]]]


def machine() -> dict[str, str]:
    """Return the processor and the versions of the frameworks."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = models[0] if models else cpu
    packages = ("torch", "jax", "flax", "timm", "numpy")
    return {
        "cpu": cpu,
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        **{p: version(p) for p in packages},
    }


def layer(measured: Layer, batch: int) -> str:
    """Return a table per measure: milliseconds and the ratio to the framework's floor; seconds; megabytes."""
    lines = [
        "# The layer against its floor",
        "",
        f"Median milliseconds of interleaved rounds, batch {batch}, float32; in brackets multiples of the floor, the",
        "layer's three matrix products alone in the same framework. Compare ratios: times vary from run to run.",
    ]
    rows = {case: dict(of["default"]) for case, of in measured.items()}
    lines += ["", "## What `implementation=None` takes", "", *_sparse_table("case", rows)]
    for measure in MEASURES:
        rows = {
            case: {n: f"{t * 1e3:.1f} ({t / of[measure][_floor(n)]:.2f}×)" for n, t in of[measure].items()}
            for case, of in measured.items()
        }
        lines += ["", f"## {measure}", "", *_sparse_table("case", rows)]
    rows = {case: {n: f"{t:.1f}" for n, t in of["compile"].items()} for case, of in measured.items()}
    lines += ["", "## Seconds to trace and compile a training step", "", *_sparse_table("case", rows)]
    rows = {
        case: {n: f"{m:.0f} ({m / of['memory']['timm']:.2f}×)" for n, m in of["memory"].items()}
        for case, of in measured.items()
        if of["memory"]
    }
    if rows:
        lines += ["", "## Peak memory of a training step", ""]
        lines += [
            "Megabytes above those resident before it, each in a process of its own; in brackets multiples of timm."
        ]
        lines += ["", *_sparse_table("case", rows)]
    return "\n".join(lines) + "\n"


def scaling(seconds: dict[str, dict[int, dict[str, float]]]) -> str:
    """Return a table per axis: milliseconds of a training step."""
    lines = ["# How the cost of a training step grows", "", "![scaling](scaling_cpu.svg)", ""]
    lines += ["Median milliseconds, float32; the layer of VOLO-D1 at batch 2 with one size changed."]
    for axis, by_size in seconds.items():
        rows = {str(size): {n: f"{t * 1e3:.1f}" for n, t in times.items()} for size, times in by_size.items()}
        lines += ["", *_sparse_table(axis, rows)]
    return "\n".join(lines) + "\n"


def _sparse_table(corner: str, rows: dict[str, dict[str, str]]) -> list[str]:
    columns = list(dict.fromkeys(name for cells in rows.values() for name in cells))
    return _table(corner, columns, {row: [cells.get(c, "") for c in columns] for row, cells in rows.items()})


def volo(compiled: dict[str, dict[str, dict[str, float]]], timings: dict[str, dict[str, float]], batch: int) -> str:
    """Return a table of compile times and one of VOLO-D1's times."""
    kinds = list(next(iter(compiled.values())))
    compile_rows = {
        variant: [f"{of[kind]['trace']:.1f} + {of[kind]['compile']:.1f}" for kind in kinds]
        for variant, of in compiled.items()
    }
    rows = {
        measure: {n: f"{t * 1e3:.0f} ({t / of['timm']:.2f}×)" for n, t in of.items()} for measure, of in timings.items()
    }
    return "\n".join(
        [
            "# Whole models",
            "",
            "## Compile time of the JAX twin",
            "",
            "Seconds to trace + to compile the forward pass for one image, blocks of a stage scanned or unrolled.",
            "",
            *_table("variant", kinds, compile_rows),
            "",
            "## VOLO-D1 at 224",
            "",
            f"Median milliseconds of interleaved rounds, batch {batch}, float32; in brackets multiples of timm, eager.",
            "Each timed run follows one of its own, as in a training loop.",
            "",
            *_sparse_table("", rows),
            "",
        ]
    )


def verify(costs: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return a table of processor seconds and one of peak memory; case -> level -> `benchmarks.verify.Cost` as JSON."""
    seconds = {case: {level: f"{cost['seconds']:.1f}" for level, cost in of.items()} for case, of in costs.items()}
    large = {case: of for case, of in costs.items() if any(cost["weights"] for cost in of.values())}
    memory = {
        case: {
            level: f"{c['megabytes']:.0f} ({c['megabytes'] / c['weights']:.1f}×; {c['estimate'] / c['weights']:.1f}×)"
            for level, c in of.items()
        }
        for case, of in large.items()
    }
    imports = max(cost["imports"] for of in costs.values() for cost in of.values())
    return "\n".join(
        [
            "# What a verification takes",
            "",
            "As `outlook verify` runs by default: float64 and float32, three training steps with each optimizer in",
            "float64; each figure of a process of its own.",
            "",
            "## Seconds of the processor",
            "",
            f"User and system time of all threads, after the imports (at most {imports:.1f}).",
            "",
            *_sparse_table("pair", seconds),
            "",
            "## Peak memory",
            "",
            "Megabytes resident at the peak, the weights of both models included, above what is resident once the",
            "models are made, after a verification of the ConvNeXt; in brackets multiples of the weights of one,",
            "and the same as `--memory` counts it.",
            "",
            *_sparse_table("pair", memory),
            "",
        ]
    )


def imports(measured: Mapping[str, Seconds], ratios: Mapping[str, Seconds]) -> str:
    """Return a table of the seconds that programs take to start, and their multiples of what they build on."""
    rows = {
        name: [f"{s.processor:.2f} ({ratios[name].processor:.2f}×)", f"{s.wall:.2f} ({ratios[name].wall:.2f}×)"]
        for name, s in measured.items()
    }
    return "\n".join(
        [
            "# What it takes to start",
            "",
            "Median seconds of processes of their own, interleaved; in brackets multiples of what each builds on:",
            "PyTorch, Flax, or the libraries of the command line.",
            "",
            *_table("program", ["processor", "wall"], rows),
            "",
        ]
    )


def sharded(found: dict[str, dict[str, Any]]) -> str:
    """Return a table of compile times: "rules, devices" -> figures."""
    one = sum(found[next(iter(found))][kind] for kind in ("trace s", "compile s"))
    rows = {}
    for name, of in found.items():
        total = of["trace s"] + of["compile s"]
        collectives = ", ".join(f"{count} {kind}" for kind, count in of["collectives"].items()) or "none"
        cells = [f"{of['trace s']:.1f} + {of['compile s']:.1f}", f"{total / one:.2f}×", str(of["instructions"])]
        rows[name] = [*cells, collectives, *(f"{of[kind]:.0f}" for kind in _MEGABYTES)]
    columns = ["trace + compile", "", "instructions", "collectives", *_MEGABYTES]
    return "\n".join(
        [
            "# Compile time on several devices",
            "",
            "A training step of VOLO-D1, batch 8, float32, AdamW: processor seconds, each in a process of its own.",
            "Arguments and temporary are bytes per device; exchanged, of whole arrays that are gathered or reduced.",
            "",
            *_table("rules, devices", columns, rows),
            "",
        ]
    )


_MEGABYTES = ("exchanged MB", "arguments MB", "temporary MB")


def plan(plans: dict[str, dict[str, tuple[Any, Any]]]) -> str:
    """Return a table; machine -> model -> `benchmarks.plan.Plan` by the rules "data" and "fsdp"."""
    columns = [
        "parameters",
        "held, `data`",
        "held, `fsdp`",
        "whole weights",
        "activations",
        "sent",
        "sending",
        "computing",
    ]
    rows = {
        f"{machine}, {name}": [
            f"{split.parameters / 1e6:.0f} M",
            *map(_megabytes, (whole.held, split.held, split.gathered, split.activations, split.sent.total)),
            f"{split.communication * 1e3:.1f} ms",
            f"{split.computing * 1e3:.1f} ms",
        ]
        for machine, of in plans.items()
        for name, (whole, split) in of.items()
    }
    return "\n".join(_table("", columns, rows))


def sharded_steps(found: dict[str, dict[str, Any]], plans: dict[str, tuple[Any, Any]]) -> str:
    """Return a page on what XLA:TPU says of steps on v5e-256; arguments as `sharded_steps_table`."""
    return "\n".join(
        [
            "# A training step on v5e-256, by XLA:TPU",
            "",
            "By `python -m benchmarks.accelerators.sharded`. **Nothing here was run on a TPU.** AdamW on token labels:",
            "1,024 images of 224 pixels on 256 chips, bfloat16, parameters and moments in float32. XLA's optimizer at",
            "its least effort, `xla_tpu_scoped_vmem_limit_kib` 8192. MB per chip and step; of what is gathered and",
            "reduced the whole arrays.",
            "",
            sharded_steps_table(found, plans),
            "",
        ]
    )


def sharded_steps_table(found: dict[str, dict[str, Any]], plans: dict[str, tuple[Any, Any]]) -> str:
    """Return a table of the compiler's figures beside those of the plan.

    Args:
        found: "volo_d1_224, fsdp" -> figures of `benchmarks.accelerators.sharded`.
        plans: "d1" -> `benchmarks.plan.Plan` by the rules "data" and "fsdp".
    """
    columns = [
        "operands",
        "planned",
        "temporary",
        "planned activations",
        "gathered",
        "planned",
        "reduced",
        "reduced, scattered",
        "processor s",
    ]
    rows = {}
    for name, of in found.items():
        variant, rules = name.split(", ")
        size = variant.split("_")[1]
        planned = plans[size][rules == "fsdp"]
        exchanged = {kind: of["exchanged MB"].get(kind, 0) for kind in ("all-gather", "all-reduce", "reduce-scatter")}
        rows[f"{size}, `{rules}`"] = [
            f"{of['operands MB']:,.0f}",
            f"{planned.held * 3 / 4 / 1e6:,.0f}",  # without gradients, which are no operands
            f"{of['temporary MB']:,.0f}",
            f"{planned.activations / 1e6:,.0f}",
            f"{exchanged['all-gather']:,.0f}",
            f"{planned.gathered / 1e6:,.0f}",
            f"{exchanged['all-reduce']:,.0f}",
            f"{exchanged['reduce-scatter']:,.0f}",
            f"{of['processor s']:.0f}",
        ]
    return "\n".join(_table("", columns, rows))


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"


def _table(corner: str, columns: list[str], rows: dict[str, list[str]]) -> list[str]:
    return [
        f"| {corner} | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()),
    ]


def _floor(contender: str) -> str:
    return "jax floor" if contender.startswith("jax") else "torch floor"


def write(folder: Path, name: str, text: str, numbers: object) -> None:
    """Write `name`.md and `name`.json into `folder`, each with the machine's description, and print the text."""
    folder.mkdir(parents=True, exist_ok=True)
    where = "; ".join(f"{key} {value}" for key, value in machine().items())
    (folder / f"{name}.md").write_text(f"{text}\nMeasured on: {where}\n")
    (folder / f"{name}.json").write_text(json.dumps({"machine": machine(), "measured": numbers}, indent=2) + "\n")
    print(text)
