"""Outlook attention over a map whose rows eight devices share; print errors and what they send, as JSON.

Started by `test_shared_rows.py`.
"""

import json
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import outlook_jax

DEVICES = 8
B, W, N, D = 2, 6, 2, 3
# Kernel size, stride, padding; rows of each device.
CASES = {
    "VOLO's": ((3, 2, 1), 2),
    "stride 1": ((3, 1, 1), 1),
    "large kernel": ((5, 2, 2), 4),
    "even kernel": ((4, 2, 1), 2),
    "rows only": (((3, 1), (2, 1), (1, 0)), 4),
    "no overlap": ((2, 2, 0), 2),
}
ROWS = PartitionSpec(None, "rows")


def loss(op: Any, *operands: jax.Array) -> jax.Array:
    return jnp.sin(op(*operands)).sum()


def op(value: jax.Array, logits: jax.Array, mask: jax.Array, **options: Any) -> jax.Array:
    return outlook_jax.outlook_attention(value, logits, dropout_mask=mask, **options)


def far(ours: Any, theirs: Any) -> float:
    pairs = [map(np.asarray, pair) for pair in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def sent(program: str) -> dict[str, int]:
    """Return how many numbers each kind of collective has as its result on one device, by kind."""
    found: dict[str, int] = {}
    for shape, kind in re.findall(r"= \w+\[([\d,]*)\]\S* (collective-permute|all-\w+|reduce-scatter)\(", program):
        found[kind] = found.get(kind, 0) + int(np.prod([int(size) for size in shape.split(",") if size]))
    return found


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    mesh = jax.make_mesh((DEVICES,), ("rows",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {"errors": {}, "sent": {}}
    for name, ((kernel, stride, padding), rows) in CASES.items():
        K, S = (np.broadcast_to(x, 2) for x in (kernel, stride))
        H, places = DEVICES * rows, int(np.prod(K))
        grid = (H // S[0], -(-W // S[1]))
        value = rng.standard_normal((B, H, W, N, D))
        logits = rng.standard_normal((B, *grid, N, places, places))
        mask = (rng.random(logits.shape) < 0.8) / 0.8
        options: dict[str, Any] = {"kernel_size": kernel, "stride": stride, "padding": padding}
        shared = jax.shard_map(
            partial(op, **options, rows_axis="rows"), mesh=mesh, in_specs=(ROWS,) * 3, out_specs=ROWS
        )
        placed = [jax.device_put(x, NamedSharding(mesh, ROWS)) for x in (value, logits, mask)]
        ours = jax.jit(jax.value_and_grad(partial(loss, shared), (0, 1)))(*placed)
        whole = partial(op, **options, implementation="reference")
        theirs = jax.jit(jax.value_and_grad(partial(loss, whole), (0, 1)))(*map(jnp.asarray, (value, logits, mask)))
        found["errors"][name] = far(ours, theirs)
        if name in ("VOLO's", "large kernel"):
            found["sent"][name] = sent(jax.jit(shared).lower(*placed).compile().as_text())

    x = rng.standard_normal((B, 2 * DEVICES, W, 8))
    layers = [
        outlook_jax.OutlookAttention(8, 2, stride=2, param_dtype=jnp.float64, rows_axis=axis, rngs=nnx.Rngs(0))
        for axis in ("rows", None)
    ]
    for layer in layers:
        layer.eval()
    run = jax.shard_map(lambda x: layers[0](x), mesh=mesh, in_specs=ROWS, out_specs=ROWS)
    found["errors"]["layer"] = far(jax.jit(run)(jnp.asarray(x)), layers[1](jnp.asarray(x)))
    found["refused"] = {
        name: refusal(mesh, rows, **options)
        for name, rows, options in (
            ("odd rows", 1, {"stride": 2}),
            ("few rows", 1, {"kernel_size": 5, "padding": 2}),
            ("reference", 2, {"implementation": "reference"}),
        )
    }
    print(json.dumps(found))


def refusal(mesh: Any, rows: int, **options: Any) -> str:
    K, S = options.get("kernel_size", 3), options.get("stride", 1)
    value = np.zeros((1, DEVICES * rows, 2, 1, 1))
    logits = np.zeros((1, DEVICES * -(-rows // S), -(-2 // S), 1, K * K, K * K))
    run = partial(outlook_jax.outlook_attention, rows_axis="rows", **options)
    try:
        jax.shard_map(run, mesh=mesh, in_specs=(ROWS, ROWS), out_specs=ROWS)(value, logits)
    except (ValueError, NotImplementedError) as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main()
