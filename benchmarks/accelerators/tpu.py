"""Compile for a TPU that is not there, and read what XLA:TPU says of the program."""

import os
import re
import shutil
import time
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from benchmarks.accelerators import hlo, llo
from benchmarks.accelerators.cases import Program

Axes = tuple[str | tuple[str, ...] | None, ...]  # as in a `PartitionSpec`

KERNEL = 'custom_call_target="tpu_custom_call"'

_dump = TemporaryDirectory(prefix="outlook-bundles-")  # until the process ends
BUNDLES = Path(_dump.name)  # where libtpu writes the bundles of what it compiles


@cache
def _ask_for_bundles() -> None:
    """Have libtpu write bundles, which reads these options when it is loaded, with the first topology.

    Before, they would only change the keys of compilations that JAX keeps, with a folder that is new in each process.
    """
    os.environ["LIBTPU_INIT_ARGS"] = " ".join(
        [
            os.environ.get("LIBTPU_INIT_ARGS", ""),
            f"--xla_jf_dump_to={BUNDLES}",
            "--xla_jf_dump_llo_text=true",
            "--xla_jf_dump_llo_pass_label_regex=final_bundles",
        ]
    )


@cache
def topology(name: str, bundles: bool = True) -> Any:
    """Return the description of "v5e:2x2", "v6e:2x2" and so on.

    Args:
        name: the topology.
        bundles: if this is the first topology of the process, write `BUNDLES` of what is compiled, which takes as long
            as compiling.
    """
    if bundles:
        _ask_for_bundles()
    return topologies.get_topology_desc(platform="tpu", topology_name=name)


def compile_for(program: Program, chips: str = "v5e:2x2") -> dict[str, Any]:
    """Compile for one chip; return figures, all but the seconds by the compiler's estimates."""
    one = SingleDeviceSharding(topology(chips).devices[0])
    operands = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), program.operands)
    for path in BUNDLES.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    start = time.perf_counter()
    compiled: Any = jax.jit(program.run).lower(*operands).compile()
    seconds = time.perf_counter() - start
    text, memory = compiled.as_text(), compiled.memory_analysis()
    operations = hlo.operations(text)
    kernels = [each for each in operations if KERNEL in each.text]
    in_kernels = sum(llo.kernel_cycles(BUNDLES, _name(each)) * each.times for each in kernels)
    return {
        "kcycles": (sum(estimated_cycles(each) * each.times for each in operations) + in_kernels) / 1e3,
        "of them in Pallas": in_kernels / 1e3,
        "Pallas kernels": len(kernels),
        "bytes / floor": compiled.cost_analysis()["bytes accessed"] / program.floor,
        "operations": len(operations),
        "temp MB": memory.temp_size_in_bytes / 1e6,
        "code MB": memory.generated_code_size_in_bytes / 1e6,
        "compile s": seconds,
    }


def collectives_when_shared(program: Program, axes: Axes, chips: str = "v5e:4x4") -> list[str]:
    """Return what 16 chips exchange if all operands lie on them by `axes`, of a mesh of "data" and "heads"."""
    mesh = topologies.make_mesh(topology(chips), (4, 4), ("data", "heads"))
    by = NamedSharding(mesh, PartitionSpec(*axes))
    operands = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by), program.operands)
    compiled: Any = jax.jit(program.run).lower(*operands).compile()
    return hlo.collectives(compiled.as_text())


def estimated_cycles(operation: hlo.Operation) -> int:
    found = re.search(r'"estimated_cycles":"(\d+)"', operation.text)
    return int(found[1]) if found else 0


def _name(operation: hlo.Operation) -> str:
    return operation.text.strip().removeprefix("ROOT ").split(" = ")[0].lstrip("%")
