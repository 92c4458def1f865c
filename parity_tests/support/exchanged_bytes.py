"""Compile training steps for eight devices; print what collectives exchange and what each device holds, as JSON."""

import json
from typing import Any

import jax
from jax.sharding import AxisType

from benchmarks.accelerators import hlo
from benchmarks.training_step import training_step
from outlook_common.config import VOLOConfig
from parity_tests.support.divisible_sizes import TWO_STAGES

# Maps large enough for "composite".
CONFIG = VOLOConfig(**TWO_STAGES | {"img_size": 64})
BATCH = 8
MESHES: dict[str, tuple[str, dict[str, int]]] = {
    "data": ("data", {"data": 8}),
    "fsdp": ("fsdp", {"data": 8}),
    "fsdp in two groups": ("fsdp", {"replica": 2, "data": 4}),
}


def main() -> None:
    found: dict[str, Any] = {}
    for name, (rules, axes) in MESHES.items():
        mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
        step = training_step(CONFIG, BATCH, mesh, rules=rules, dtype="float32")
        compiled = step.run.lower(*step.operands).compile()
        text, memory = compiled.as_text(), compiled.memory_analysis()
        assert text is not None
        found[name] = {"exchanged": hlo.exchanged(text), "arguments": memory.argument_size_in_bytes}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
