"""`python -m benchmarks.convert`: time and peak memory of converting VOLO-D5, against a copy."""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks import report
from outlook_common.config import VOLO_VARIANTS
from outlook_common.weights import convert, write_arrays
from outlook_common.weights.checksums import source_sha256
from outlook_common.weights.identify import table_for
from outlook_common.weights.io.atomic import remove

VARIANT = "volo_d5_512"
SOURCES = ("safetensors", "npz", "orbax", "pth")
# Every pair of what can be read a tensor at a time, and PyTorch's to and from one of them.
PAIRS = (
    *itertools.product(SOURCES[:3], SOURCES[:3]),
    ("pth", "safetensors"),
    ("safetensors", "pth"),
)
# What no conversion can be faster than: one file's SHA-256 keeps one core busy from its first byte to its last.
HASHING = "SHA-256 of .safetensors alone"
MEGABYTE = 1e6
BLOCK = 1 << 20
REHEARSED = 5 << 28


def run(source: str, destination: str) -> dict[str, float]:
    """Convert in this process; return the seconds and the peak of additional memory."""
    if "pth" in (source + destination):
        import torch  # noqa: F401
    if "orbax" in (source + destination):
        import orbax.checkpoint  # noqa: F401
    _rehearse(Path(destination))
    before = _peak()
    start = time.perf_counter()
    convert(source, destination)
    return {"seconds": time.perf_counter() - start, "megabytes": (_peak() - before) / MEGABYTE}


def copy(source: str, destination: str) -> dict[str, float]:
    """Copy the same bytes; return the seconds without and with fsync."""
    _rehearse(Path(destination))
    block = bytearray(BLOCK)
    start = time.perf_counter()
    with Path(source).open("rb", buffering=0) as there, Path(destination).open("wb", buffering=0) as here:
        while count := there.readinto(block):
            here.write(memoryview(block)[:count])
        written = time.perf_counter() - start
        os.fsync(here.fileno())
    return {"seconds": written, "seconds with fsync": time.perf_counter() - start}


def digest(source: str) -> dict[str, float]:
    """Return the seconds that hashing takes alone, as `convert` does it."""
    start = time.perf_counter()
    source_sha256(Path(source))
    return {"seconds": time.perf_counter() - start}


def _rehearse(destination: Path) -> None:
    """Fill as much of the page cache as what is measured will, and leave it free.

    A virtual machine hands memory that is free for seconds back to its host. To have it again took a copy four times
    as long, which says nothing of the copy, nor of a conversion.
    """
    path, block = destination.with_name("rehearsal"), bytes(BLOCK)
    with path.open("wb", buffering=0) as file:
        for _ in range(REHEARSED // BLOCK):
            file.write(block)
    path.unlink()


def _peak() -> float:
    """Return the peak memory of this process (`ru_maxrss` would include its parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def in_a_process(name: str, *arguments: str) -> dict[str, float]:
    """Run one of the functions above in a new process and return its result."""
    code = f"import json, sys; from benchmarks.convert import {name}; print(json.dumps({name}(*sys.argv[1:])))"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def draw(folder: Path) -> dict[str, Any]:
    """Write random weights in every format; return their size and that of the largest tensor."""
    rng = np.random.default_rng(0)
    arrays = {
        entry.torch: np.array(3, entry.dtype) if entry.dtype else rng.standard_normal(entry.shape, dtype=np.float32)
        for entry in table_for(VOLO_VARIANTS[VARIANT].config).entries
    }
    write_arrays(folder / "source.safetensors", arrays)
    for kind in SOURCES[1:]:
        convert(folder / "source.safetensors", folder / f"source.{kind}", to="torch")
    sizes = [array.nbytes for array in arrays.values()]
    return {"tensors": len(sizes), "megabytes": sum(sizes) / MEGABYTE, "largest megabytes": max(sizes) / MEGABYTE}


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """Return the samples of each pair of formats, each beside those of a copy that ran just before it.

    What a copy takes changes threefold within minutes, with the memory that the host has; so only neighbours compare.
    """
    size = draw(folder)
    origin = str(folder / "source.safetensors")
    copying = partial(in_a_process, "copy", origin, str(folder / "copy.bin"))
    jobs: dict[str, Callable[[], dict[str, float]]] = {}
    for source, destination in PAIRS:
        paths = str(folder / f"source.{source}"), str(folder / f"to.{destination}")
        jobs[f"{source} → {destination}"] = partial(in_a_process, "run", *paths)
    jobs[HASHING] = partial(in_a_process, "digest", origin)
    samples: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            found = {}
            for what, run in (("copy", copying), ("conversion", job)):
                found[what] = run()
                for path in folder.iterdir():
                    if not path.name.startswith("source."):
                        remove(path)
            samples[name].append(found)
    return {"variant": VARIANT, "size": size, "rounds": rounds, "samples": samples}


def text(found: dict[str, Any]) -> str:
    """Return a table of median times, and of speeds relative to the copy."""
    size, samples = found["size"], found["samples"]
    copies = [sample["copy"] for of_one in samples.values() for sample in of_one]
    plain, synced = (_spread([copy[key] for copy in copies], "{:.2f}") for key in ("seconds", "seconds with fsync"))
    lines = [
        f"# Converting a {found['variant']}",
        "",
        f"{size['tensors']} tensors, {size['megabytes']:.0f} MB in all, {size['largest megabytes']:.1f} the largest,",
        "from PyTorch's names to Flax's (for .pth to PyTorch's), the source in the page cache; medians of",
        f"{found['rounds']} interleaved rounds, each in a process of its own, and in brackets the least and the most.",
        "Converting hashes the source, writes, waits for the disk, reads back and compares every bit.",
        f"Copying the same bytes with read and write took {plain} s, with fsync {synced} s; each",
        "conversion is compared to a copy that ran just before it. Before each, as much of the page cache was",
        "filled and left free again. Memory is the peak above that of the process with its imports.",
        "",
        "| from → to | seconds | of the speed of a copy | of a copy with fsync | peak memory, MB |",
        "|---|---|---|---|---|",
    ]
    for name, of_one in samples.items():
        seconds = [sample["conversion"]["seconds"] for sample in of_one]
        speeds = [
            _spread([sample["copy"][key] / sample["conversion"]["seconds"] for sample in of_one], "{:.0%}")
            for key in ("seconds", "seconds with fsync")
        ]
        memory = "–"
        if name != HASHING:
            memory = f"{statistics.median(sample['conversion']['megabytes'] for sample in of_one):.0f}"
        lines.append(f"| {name} | {_spread(seconds, '{:.2f}')} | {' | '.join(speeds)} | {memory} |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float], form: str) -> str:
    """Return median, minimum and maximum."""
    middle, least, most = (form.format(x) for x in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({least} to {most})"


def main(
    rounds: Annotated[int, typer.Option(help="Rounds; every pair of formats runs once in each.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = report.FOLDER,
    scratch: Annotated[Path | None, typer.Option(help="Where to write 8 GB of checkpoints.")] = None,
) -> None:
    """Measure time and peak memory of converting VOLO-D5 between all formats."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        found = measure(Path(folder), rounds)
    report.write(out, "convert_cpu", text(found), found)


if __name__ == "__main__":
    typer.run(main)
