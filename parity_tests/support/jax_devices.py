"""Run the op in JAX on four devices and print what came out as JSON: started by `test_jax_devices.py`.

How many devices a CPU is taken for is settled before JAX is first used, so this runs in a process of its own.
"""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from outlook_jax import outlook_attention
from parity_tests.support.runners import relative_error

SPECS = {
    "batch": (PartitionSpec("x"), PartitionSpec("x")),
    "heads": (PartitionSpec(None, None, None, "x"), PartitionSpec(None, None, None, "x")),
    "batch, the same logits everywhere": (PartitionSpec("x"), PartitionSpec()),
    "batch, the same value everywhere": (PartitionSpec(), PartitionSpec("x")),
}
DEVICES = 4


def main() -> None:
    """Print how far loss and gradients are from those of one device, and what is exchanged where heads are shared."""
    jax.config.update("jax_enable_x64", True)
    mesh = jax.make_mesh((DEVICES,), ("x",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    value = jnp.asarray(rng.standard_normal((DEVICES, 3, 4, DEVICES, 2)))
    logits = jnp.asarray(rng.standard_normal((DEVICES, 3, 4, DEVICES, 3, 3)))
    op = partial(outlook_attention, kernel_size=(3, 1), padding=(1, 0))

    def loss(implementation: str, value: jax.Array, logits: jax.Array) -> jax.Array:
        return jnp.sin(op(value, logits, implementation=implementation)).sum()

    found = {}
    for name, specs in SPECS.items():
        # What is the same everywhere is one device's share; its loss is that of the share repeated.
        whole = [x if spec else x[:1] for x, spec in zip((value, logits), specs, strict=True)]

        def mapped(*operands: jax.Array, specs: tuple[PartitionSpec, PartitionSpec] = specs) -> jax.Array:
            def share(*operands: jax.Array) -> jax.Array:
                return jax.lax.psum(loss("composite", *operands), "x")

            return jax.shard_map(share, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())(*operands)

        def repeated(*operands: jax.Array) -> jax.Array:
            return loss("reference", *(jnp.broadcast_to(x, (DEVICES, *x.shape[1:])) for x in operands))

        ours, theirs = (jax.jit(jax.value_and_grad(f, (0, 1)))(*whole) for f in (mapped, repeated))
        pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
        found[name] = max(relative_error(np.asarray(a), np.asarray(b)) for a, b in pairs)

    shared = [jax.device_put(x, NamedSharding(mesh, SPECS["heads"][0])) for x in (value, logits)]
    program = jax.jit(jax.value_and_grad(partial(loss, "composite"), (0, 1))).lower(*shared).compile().as_text()
    assert program is not None
    print(
        json.dumps(
            {
                "errors": found,
                "reduced": program.count("all-reduce("),
                "gathered": program.count("all-gather("),
                "kernels": kernels_on_tpus(mesh),
            }
        )
    )


def kernels_on_tpus(mesh: jax.sharding.Mesh) -> dict[str, int]:
    """Return how many kernels the default has, lowered for TPUs that share the batch in two ways, or for one TPU."""
    shapes = (DEVICES, 12, 7, 2, 32), (DEVICES, 12, 7, 2, 9, 9)
    by_batch = NamedSharding(mesh, PartitionSpec("x"))
    split = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=by_batch) for shape in shapes]
    mapped = jax.shard_map(outlook_attention, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"))
    programs = {
        "XLA": (outlook_attention, split),
        "shard_map": (mapped, split),
        "one": (outlook_attention, [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]),
    }
    return {
        name: jax.jit(run).trace(*operands).lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call")
        for name, (run, operands) in programs.items()
    }


if __name__ == "__main__":
    main()
