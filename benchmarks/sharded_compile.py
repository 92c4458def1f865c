"""Compile time of a training step on several devices against that on one, each in a process of its own."""

import json
import os
import resource
import subprocess
import sys
from collections import Counter
from typing import Any

VARIANT = "volo_d1_224"
DEVICES = 8
BATCH = 8
# Rules of the weights, devices.
STEPS = (("data", 1), ("data", DEVICES), ("fsdp", DEVICES))


def measure(rules: str, devices: int) -> dict[str, Any]:
    """Return processor seconds to trace and to compile, and what the program holds and exchanges."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.sharded_compile", rules],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _compiled_here(rules: str) -> dict[str, Any]:
    import jax
    from jax.sharding import AxisType

    from benchmarks.accelerators import hlo
    from benchmarks.training_step import training_step
    from outlook_common.config import volo_config

    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    step = training_step(volo_config(VARIANT), BATCH, mesh, rules=rules, dtype="float32")
    seconds = [_processor_seconds()]
    lowered = step.run.lower(*step.operands)
    seconds.append(_processor_seconds())
    compiled = lowered.compile()
    seconds.append(_processor_seconds())
    text, memory = compiled.as_text(), compiled.memory_analysis()
    return {
        "trace s": seconds[1] - seconds[0],
        "compile s": seconds[2] - seconds[1],
        "instructions": text.count(" = "),
        "collectives": dict(Counter(hlo.collectives(text))),
        "exchanged MB": sum(hlo.exchanged(text).values()) / 1e6,
        "arguments MB": memory.argument_size_in_bytes / 1e6,
        "temporary MB": memory.temp_size_in_bytes / 1e6,
    }


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    print(json.dumps(_compiled_here(sys.argv[1])))
