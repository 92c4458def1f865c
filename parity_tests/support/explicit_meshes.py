"""Run op and model in JAX over meshes with explicit and automatic axes and print what came out, as JSON.

Started by `test_sharding.py`.
"""

import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import outlook_jax

SPECS = {
    "batch and heads": PartitionSpec("a", None, None, "b"),
    "rows": PartitionSpec(None, "a"),
}
KINDS = {"explicit": AxisType.Explicit, "auto": AxisType.Auto}
IMPLEMENTATIONS = ("reference", "composite")


def loss(implementation: str, value: jax.Array, logits: jax.Array) -> jax.Array:
    return jnp.sin(outlook_jax.outlook_attention(value, logits, stride=2, implementation=implementation)).sum()


def far(ours: Any, theirs: Any) -> float:
    pairs = [map(np.asarray, pair) for pair in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def of_the_op() -> dict[str, float]:
    """Return how far loss and gradients are from those of one device, by kind of mesh, implementation and spec."""
    rng = np.random.default_rng(0)
    operands = rng.standard_normal((2, 8, 8, 4, 2)), rng.standard_normal((2, 4, 4, 4, 9, 9))
    found = {}
    for implementation in IMPLEMENTATIONS:
        run = jax.jit(jax.value_and_grad(partial(loss, implementation), (0, 1)))
        one = run(*map(jnp.asarray, operands))
        for kind, axis_type in KINDS.items():
            mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(axis_type,) * 2)
            with jax.set_mesh(mesh):
                for name, spec in SPECS.items():
                    shared = [jax.device_put(x, NamedSharding(mesh, spec)) for x in operands]
                    found[f"{kind} {implementation} {name}"] = far(run(*shared), one)
    return found


def of_the_model() -> dict[str, str]:
    """Return how the results of a model's training are sharded, by implementation, where the images' batch is."""
    mesh = jax.make_mesh((2, 2), ("a", "b"))
    sizes: dict[str, Any] = {"layers": (1, 2, 1, 1), "embed_dims": (8, 16, 16, 16), "num_heads": (2,) * 4}
    rates = {"drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_path_rate": 0.1}
    found = {}
    with jax.set_mesh(mesh):
        images = jax.ShapeDtypeStruct((4, 64, 64, 3), np.float32, sharding=NamedSharding(mesh, PartitionSpec("a")))
        for implementation in IMPLEMENTATIONS:
            options: dict[str, Any] = {"implementation": implementation, "img_size": 64, **sizes, **rates}

            def train(images: Any, options: dict[str, Any] = options) -> Any:
                model = outlook_jax.volo("volo_d1_224", rngs=nnx.Rngs(0), **options)

                def loss(model: Any) -> Any:
                    cls, aux, _ = model.forward_train(images)
                    return jnp.square(cls).sum() + jnp.square(aux).sum(), (cls, aux)

                (_, outputs), gradients = nnx.value_and_grad(loss, has_aux=True)(model)
                return outputs, gradients.head.kernel.get_value()

            shapes = jax.tree.leaves(jax.eval_shape(train, images))
            found[implementation] = ", ".join(str(shape.sharding.spec) for shape in shapes)
    return found


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    op = of_the_op()
    jax.config.update("jax_enable_x64", False)
    print(json.dumps({"op": op, "model": of_the_model()}))
