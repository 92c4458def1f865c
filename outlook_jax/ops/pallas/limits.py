"""Which operands the kernels take."""

from typing import Any

from outlook_common.geometry import WindowGrid
from outlook_jax.ops.pallas.interpret import is_interpreted
from outlook_jax.ops.pallas.shapes import Shaped

# Pairs of places are unrolled: with more, a kernel compiles for minutes.
PLACES = 25


def refusal(value: Shaped, logits: Shaped, dropout_mask: Shaped, grid: WindowGrid, *_: Any, **__: Any) -> str | None:
    """Say why these operands cannot be computed this way, or None if they can. Where it runs is known later."""
    # Here, as JAX takes a while to import Pallas.
    from outlook_jax.ops.pallas import batch_launch
    from outlook_jax.ops.pallas.launch import VMEM, cells_of, vmem_bytes

    operands = {"value": value, "logits": logits, "dropout_mask": dropout_mask}
    if not all(isinstance(size, int) for size in value.shape):
        return f"value has the symbolic shape {value.shape}; the reference takes a symbolic batch"
    if not is_interpreted():
        for name, x in operands.items():
            if x is not None and x.dtype.name in ("float16", "float64"):
                return f"{name} is {x.dtype.name}, which TPUs do not compute in; bfloat16 and float32 they do"
    if grid.places > PLACES:
        return f"kernel_size={grid.kernel_size} has {grid.places} places; more than {PLACES} compile for minutes"
    if batch_launch.fits(grid, value, logits, () if dropout_mask is None else (dropout_mask,)):
        return None
    needed = vmem_bytes(cells_of(grid, value, logits, dropout_mask), value, logits, dropout_mask)
    if needed > VMEM:
        return f"one row of windows needs {needed} bytes of VMEM, more than {VMEM}: value has shape {value.shape}"
    return None
