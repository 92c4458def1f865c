"""Compile for an H100 that is not there, and read what XLA:GPU and ptxas say of the program."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from benchmarks.accelerators import hlo
from benchmarks.accelerators.cases import Program

# Which of its own matrix products is the fastest XLA finds out by running them.
OPTIONS = {"xla_gpu_enable_triton_gemm": False}
_PTXAS = r"Used (\d+) registers|(\d+) bytes spill (?:stores|loads)"


@cache
def h100() -> Any:
    """Return the description of one H100."""
    config = Path(__file__).with_name("h100.txtpb").read_text()
    return topologies.get_topology_desc("h100:1", platform="cuda", target_config=config, topology="1x1x1")


def compile_for(program: Program) -> dict[str, Any]:
    """Compile for one H100; return figures, all but the seconds by the compilers' estimates."""
    one = SingleDeviceSharding(h100().devices[0])
    operands = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), program.operands)
    with TemporaryDirectory() as folder:
        start = time.perf_counter()
        compiled: Any = jax.jit(program.run).lower(*operands).compile(OPTIONS | {"xla_dump_to": folder})
        seconds = time.perf_counter() - start
        ptx = [path for path in Path(folder).rglob("*.ptx") if ".entry" in path.read_text()]  # some are empty
        assert ptx, "XLA dumped no PTX"
        atomics = sum(len(re.findall(r"\b(?:atom|red)\.", path.read_text())) for path in ptx)
        registers, spilled = map(list, zip(*(pair for path in ptx for pair in _assembled(path)), strict=True))
    operations = hlo.operations(compiled.as_text())
    return {
        "kernels": sum(each.times for each in operations),
        "bytes / floor": sum(each.bytes * each.times for each in operations) / program.floor,
        "registers": max(registers),
        "spilled bytes": sum(spilled),
        "atomics": atomics,
        "temp MB": compiled.memory_analysis().temp_size_in_bytes / 1e6,
        "compile s": seconds,
    }


def _assembled(ptx: Path) -> Iterator[tuple[int, int]]:
    """Yield registers and spilled bytes of each kernel of a file."""
    ptxas = next(
        Path(path, "nvidia/cuda_nvcc/bin/ptxas") for path in sys.path if Path(path, "nvidia/cuda_nvcc").is_dir()
    )
    command: list[str | Path] = [ptxas, "-v", "-arch=sm_90a", ptx, "-o", ptx.with_suffix(".cubin")]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = 0
    for registers, spill in re.findall(_PTXAS, log):
        if spill:
            spilled += int(spill)
        else:
            yield int(registers), spilled
            spilled = 0
