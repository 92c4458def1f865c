"""Write what was measured: a Markdown table for people, JSON for programs."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

FOLDER = Path("benchmarks/results")
MEASURES = ("forward", "forward+backward")

# case -> measure -> contender -> median seconds
Timings = dict[str, dict[str, dict[str, float]]]


def machine() -> dict[str, str]:
    """Return what a timing depends on: the processor, and the versions of the frameworks."""
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


def layer(timings: Timings) -> str:
    """Return a table per measure: milliseconds, and in brackets the ratio to the framework's floor."""
    lines = [
        "# The layer against its floor",
        "",
        "Median milliseconds of interleaved rounds, float32; in brackets multiples of the floor, the layer's three",
        "matrix products alone in the same framework. Compare ratios: absolute times vary from run to run.",
    ]
    for measure in MEASURES:
        names = list(next(iter(timings.values()))[measure])
        rows = {
            case: [f"{times[n] * 1e3:.1f} ({times[n] / times[_floor(n)]:.1f}×)" for n in names]
            for case, times in ((case, measures[measure]) for case, measures in timings.items())
        }
        lines += ["", f"## {measure}", "", *_table("case", names, rows)]
    return "\n".join(lines) + "\n"


def volo(compiled: dict[str, dict[str, dict[str, float]]], forward: dict[str, dict[str, float]], batch: int) -> str:
    """Return a table of compile times and one of forward times."""
    kinds = list(next(iter(compiled.values())))
    compile_rows = {
        variant: [f"{of[kind]['trace']:.1f} + {of[kind]['compile']:.1f}" for kind in kinds]
        for variant, of in compiled.items()
    }
    names = list(next(iter(forward.values())))
    forward_rows = {
        variant: [f"{of[n] * 1e3:.0f} ({of[n] / of['timm']:.2f}×)" for n in names] for variant, of in forward.items()
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
            "## Forward",
            "",
            f"Median milliseconds of interleaved rounds, batch {batch}, float32; in brackets multiples of timm, eager.",
            "",
            *_table("variant", names, forward_rows),
            "",
        ]
    )


def _table(corner: str, columns: list[str], rows: dict[str, list[str]]) -> list[str]:
    return [
        f"| {corner} | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()),
    ]


def _floor(contender: str) -> str:
    return "jax floor" if contender.startswith("jax") else "torch floor"


def write(folder: Path, name: str, text: str, numbers: object) -> None:
    """Write `name`.md and `name`.json into `folder`, each with the machine's name, and print the text."""
    folder.mkdir(parents=True, exist_ok=True)
    where = "; ".join(f"{key} {value}" for key, value in machine().items())
    (folder / f"{name}.md").write_text(f"{text}\nMeasured on: {where}\n")
    (folder / f"{name}.json").write_text(json.dumps({"machine": machine(), "measured": numbers}, indent=2) + "\n")
    print(text)
