"""Which implementation `implementation=None` takes, by the platform that a program is lowered for.

The evidence, of `benchmarks/results/accelerators.md`: for TPUs, XLA:TPU's and Mosaic's own estimates for a v5e in
thousands of cycles; for GPUs, the bytes and kernels of XLA:GPU's programs for an H100; for CPUs, what was measured
(`layer_cpu.md`).

| platform | the op | reference | composite | pallas |
|---|---|---:|---:|---:|
| v5e | volo_d1, batch 8, float32, forward | 1,442 | 1,571 | 206 |
| v5e | volo_d1, batch 128, bfloat16, forward | 30,389 | 5,318 | 645 |
| v5e | volo_d1, batch 128, bfloat16, backward | 73,452 | 10,666 | 1,733 |
| v5e | seed_512, batch 32, bfloat16, forward | 12,550 | 3,964 | 1,304 |
| v5e | seed_512, batch 32, bfloat16, backward | 60,715 | 8,576 | 2,279 |
| v5e | small_map, batch 2, float32, forward | 68 | | 11 |
| v5e | volo_d1, batch 8, float16, forward | 1,421 | 1,621 | cannot run |
| v5e | volo_d1, batch 8, float16, backward | 9,341 | 3,355 | cannot run |
| v5e | volo_d1, batch 128, float16, forward | 30,219 | 5,318 | cannot run |
| v5e | volo_d1, batch 128, float16, backward | 73,494 | 10,587 | cannot run |
| v5e | volo_d1 with kernel 7, stride 1, batch 8, float32, forward | 52,868 | 61,325 | cannot run |
| v5e | 14×14, 2 heads of 32, stride 2, batch 2, float16, backward | 316 | 390 | cannot run |
| H100 | every case | more of both | fewest | cannot run |

So a TPU gets pallas, or composite where pallas cannot run. There the reference has the lower estimate for small maps
and batches, by up to a fifth, with its products in bfloat16 where composite's are exact; for large ones it takes up to
seven times as long.
"""

from collections.abc import Callable
from typing import Any

from jax import Array

from outlook_common.dispatch import Implementation, choose
from outlook_common.geometry import WindowGrid
from outlook_jax.ops.composite import COMPOSITE
from outlook_jax.ops.pallas import PALLAS, pallas_or_composite, pallas_or_reference
from outlook_jax.ops.reference import REFERENCE

# From fastest to slowest, where each can run.
IMPLEMENTATIONS: dict[str, Implementation] = {"pallas": PALLAS, "composite": COMPOSITE, "reference": REFERENCE}


def choose_by_platform(value: Array, logits: Array, dropout_mask: Array | None, grid: WindowGrid) -> Callable[..., Any]:
    """Return what computes the op: pallas on a TPU, if it can, and composite or the reference elsewhere.

    Where XLA splits the program among several TPUs (GSPMD) it is as elsewhere: it splits no kernel.

    Which platform a program is for is known when it is lowered, so the choice is part of a primitive's lowering, and
    one `jax.export` for several platforms is right on each.
    """
    operands = value, logits, dropout_mask, grid
    elsewhere = choose(None, {name: IMPLEMENTATIONS[name] for name in ("composite", "reference")}, *operands)
    if PALLAS.refusal(*operands) is not None:
        return elsewhere
    return pallas_or_composite if elsewhere is IMPLEMENTATIONS["composite"].run else pallas_or_reference
