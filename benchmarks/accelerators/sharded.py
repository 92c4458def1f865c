"""What XLA:TPU says of a training step on a whole pod: `python -m benchmarks.accelerators.sharded volo_d1_224 fsdp`."""

import argparse
import json
import math
import time
from typing import Any

from benchmarks.accelerators import hlo, tpu  # before JAX, whose environment they set
from benchmarks.plan import V5E_256
from benchmarks.training_step import training_step
from outlook_common.config import volo_config

CHIPS = "v5e:16x16"


def compile_for(variant: str, rules: str, batch: int) -> dict[str, Any]:
    """Compile for v5e-256; return bytes per chip, and those of the whole arrays that are gathered or reduced."""
    import jax
    from jax.experimental import mesh_utils

    # At the usual effort it takes minutes more, and memory and collectives are the same kinds.
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    axes = V5E_256.mesh
    chips = mesh_utils.create_device_mesh(
        tuple(axes.values()), tpu.topology(CHIPS).devices, allow_split_physical_axes=True
    )
    mesh = jax.sharding.Mesh(chips, tuple(axes))
    step = training_step(volo_config(variant), batch, mesh, rules=rules, dtype="bfloat16")
    start = time.process_time()
    compiled = step.run.lower(*step.operands).compile()
    memory = compiled.memory_analysis()
    exchanged = hlo.exchanged(compiled.as_text())
    return {
        "model": variant,
        "rules": rules,
        "images per chip": batch // math.prod(axes.values()),
        "operands MB": memory.argument_size_in_bytes / 1e6,
        "temporary MB": memory.temp_size_in_bytes / 1e6,
        "exchanged MB": {kind: size / 1e6 for kind, size in exchanged.items()},
        "compile s": time.process_time() - start,
    }


def main() -> None:
    """Print figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variant")
    parser.add_argument("rules", choices=["data", "fsdp"])
    parser.add_argument("--batch", type=int, default=1024, help="images on all chips together")
    print(json.dumps(compile_for(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
