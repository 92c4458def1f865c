"""What XLA:TPU says of a training step on a whole pod, v5e-256.

    python -m benchmarks.accelerators.sharded [volo_d1_224 …] [--rules data fsdp] [--scoped-vmem-kib 8192]

Nothing is run. Each program that is compiled goes into benchmarks/results/sharded_step_v5e.json, beside those of
earlier calls, and the table is written anew.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.accelerators import hlo, tpu  # before JAX, whose environment they set
from benchmarks.plan import V5E_256, plans
from benchmarks.training_step import training_step
from outlook_common.config import volo_config

CHIPS = "v5e:16x16"
MODELS = [f"volo_d{size}_224" for size in range(1, 6)]
RESULTS = Path(__file__).parents[1] / "results" / "sharded_step_v5e.json"


def compile_for(variant: str, rules: str, batch: int, options: dict[str, Any]) -> dict[str, Any]:
    """Compile for v5e-256; return bytes per chip, and those of the whole arrays that are gathered or reduced."""
    import jax
    from jax.experimental import mesh_utils

    # At the usual effort it takes minutes more, and memory and collectives are the same kinds.
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    axes = V5E_256.mesh
    chips = mesh_utils.create_device_mesh(
        tuple(axes.values()), tpu.topology(CHIPS, bundles=False).devices, allow_split_physical_axes=True
    )
    mesh = jax.sharding.Mesh(chips, tuple(axes))
    step = training_step(volo_config(variant), batch, mesh, rules=rules, dtype="bfloat16")
    start = time.process_time()
    compiled = step.run.lower(*step.operands).compile(options)
    memory = compiled.memory_analysis()
    exchanged = hlo.exchanged(compiled.as_text())
    return {
        "images per chip": batch // math.prod(axes.values()),
        "operands MB": round(memory.argument_size_in_bytes / 1e6, 1),
        "temporary MB": round(memory.temp_size_in_bytes / 1e6, 1),
        "exchanged MB": {kind: round(size / 1e6, 1) for kind, size in exchanged.items()},
        "processor s": round(time.process_time() - start, 1),
    }


def main() -> None:
    """Compile, and write figures and table."""
    parser = argparse.ArgumentParser(prog="benchmarks.accelerators.sharded", description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="*", help="by name; volo_d1_224 to volo_d5_224 by default")
    parser.add_argument("--rules", nargs="*", default=["data", "fsdp"], choices=["data", "fsdp"])
    parser.add_argument("--batch", type=int, default=1024, help="images on all chips together")
    parser.add_argument("--scoped-vmem-kib", type=int, default=8192, help="xla_tpu_scoped_vmem_limit_kib")
    given = parser.parse_args()
    for variant in given.variants or MODELS:
        for rules in given.rules:
            options = {"xla_tpu_scoped_vmem_limit_kib": given.scoped_vmem_kib}
            figures = compile_for(variant, rules, given.batch, options)
            print(variant, rules, figures, flush=True)
            found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            found[f"{variant}, {rules}"] = figures
            RESULTS.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")
            RESULTS.with_suffix(".md").write_text(report.sharded_steps(found, plans(given.batch)[V5E_256.name]))


if __name__ == "__main__":
    main()
