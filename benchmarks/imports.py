"""Start-up: what it takes to import each twin, against its framework, and to ask the command line for help."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

_OUTLOOK = "import sys; from outlook_parity.cli.app import main; sys.argv = ['outlook', {!r}]; main()"

# name → program, and the name of what it is measured against
PROGRAMS = {
    "torch": ("import torch", "torch"),
    "outlook_torch": ("import outlook_torch", "torch"),
    "flax.nnx": ("from flax import nnx", "flax.nnx"),
    "outlook_jax": ("import outlook_jax", "flax.nnx"),
    "typer, rich, numpy": ("import typer, rich.table, rich.progress, numpy", "typer, rich, numpy"),
    "outlook --help": (_OUTLOOK.format("--help"), "typer, rich, numpy"),
    "outlook inspect --help": (_OUTLOOK.replace("{!r}", "{!r}, '--help'").format("inspect"), "typer, rich, numpy"),
}


@dataclass(frozen=True)
class Seconds:
    processor: float
    wall: float


def measure(rounds: int) -> dict[str, Seconds]:
    """Return the medians of every program, each run in processes of its own, interleaved."""
    samples: dict[str, list[Seconds]] = {name: [] for name in PROGRAMS}
    for round_ in range(rounds + 1):
        for name, (program, _) in PROGRAMS.items():
            taken = _run(program)
            if round_:  # the first reads files that the others find in the cache
                samples[name].append(taken)
    return {
        name: Seconds(statistics.median(s.processor for s in taken), statistics.median(s.wall for s in taken))
        for name, taken in samples.items()
    }


def ratios(measured: Mapping[str, Seconds]) -> dict[str, Seconds]:
    """Return multiples of what each is measured against."""
    return {
        name: Seconds(measured[name].processor / measured[base].processor, measured[name].wall / measured[base].wall)
        for name, (_, base) in PROGRAMS.items()
    }


def _run(program: str) -> Seconds:
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {program}")
    return Seconds(usage.ru_utime + usage.ru_stime, wall)
