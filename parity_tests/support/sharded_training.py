"""Train a small VOLO on eight devices and on one, and print how far they are apart, as JSON.

Started by `test_sharded_training.py` with the names of what to compare; and with the number of a process, of all of
them, a port and a folder, as one of several processes that share the devices.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import outlook_jax
from outlook_common.config import VOLOConfig
from outlook_jax.losses import TokenLabelCrossEntropy
from outlook_jax.weights import gathered
from outlook_parity.models.builtin import draw_weights
from parity_tests.support.divisible_sizes import TWO_STAGES

CONFIG = VOLOConfig(**TWO_STAGES)
DEVICES = 8
STEPS = 2
BOX = (0, 1, 2, 2)

Outcome = dict[str, np.ndarray]
Put = Callable[[Any, NamedSharding], jax.Array]


def put(array: Any, sharding: NamedSharding) -> jax.Array:
    """Place an array that every process has whole."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        data = put(jax.random.key_data(array), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda part: whole[part])


def make(**options: Any) -> outlook_jax.VOLO:
    """Return the model with drawn weights, on one device."""
    model = outlook_jax.VOLO(CONFIG, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options)
    outlook_jax.load_weights(model, draw_weights(CONFIG))
    return model


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Return images and targets of the class token and of every token."""
    rng = np.random.default_rng(0)
    scores = np.exp(2 * rng.standard_normal((DEVICES, CONFIG.num_classes, 2 + 4)))
    return rng.standard_normal((DEVICES, *CONFIG.img_size, 3)), scores / scores.sum(axis=1, keepdims=True)


def loss_of(model: outlook_jax.VOLO, images: Any, targets: Any, box: Any = BOX) -> jax.Array:
    return TokenLabelCrossEntropy()(model.forward_train(images, box), targets)


Gradients = Callable[[Any, Any, Any], tuple[jax.Array, Any]]


def by_the_compiler(model: Any, images: Any, targets: Any) -> tuple[jax.Array, Any]:
    return nnx.value_and_grad(loss_of)(model, images, targets)


def trained(model: outlook_jax.VOLO, images: Any, targets: Any, differentiate: Gradients = by_the_compiler) -> Outcome:
    """Return losses, the first gradients, and weights and statistics after the steps."""
    sharding = model.head.kernel.get_value().sharding
    # With the optimizer's counts on the mesh from the beginning, all steps run one program.
    with jax.set_mesh(sharding.mesh) if isinstance(sharding, NamedSharding) else nullcontext():
        optimizer = nnx.Optimizer(model, optax.adamw(1e-3, eps=1e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any, images: Any, targets: Any) -> tuple[jax.Array, Any]:
        loss, gradients = differentiate(model, images, targets)
        optimizer.update(model, gradients)
        return loss, gradients

    losses, first = [], {}
    for index in range(STEPS):
        loss, gradients = step(model, optimizer, images, targets)
        losses.append(gathered(loss))
        if index == 0:
            flat = nnx.to_flat_state(gradients)
            first = {f"gradient of {'.'.join(map(str, path))}": gathered(v.get_value()) for path, v in flat}
    return {"losses": np.stack(losses), **first, **outlook_jax.export_weights(model)}


def distance(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the largest relative errors of losses, gradients, weights and statistics."""
    assert ours.keys() == theirs.keys()
    found: dict[str, float] = {}
    for name, array in ours.items():
        kind = name.split(" ")[0] if name.startswith(("losses", "gradient")) else "weights"
        kind = "statistics" if "running" in name else kind
        found[kind] = max(found.get(kind, 0.0), _relative_error(array, theirs[name]))
    return found


def _relative_error(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


def on_mesh(mesh: Mesh, rules: Any, **options: Any) -> tuple[outlook_jax.VOLO, jax.Array, jax.Array]:
    """Return the model and a batch, sharded by rules."""
    model = make(**options)
    shardings = outlook_jax.named_shardings(model, mesh, rules)
    nnx.update(model, jax.tree.map(put, nnx.state(model), shardings))
    images, targets = (put(x, NamedSharding(mesh, PartitionSpec("data"))) for x in batch())
    return model, images, targets


def by_gathered_weights(mesh: Mesh) -> Gradients:
    def differentiate(model: Any, images: Any, targets: Any) -> tuple[jax.Array, Any]:
        return nnx.value_and_grad(lambda model: loss_of(outlook_jax.gather_weights(model, mesh), images, targets))(
            model
        )

    return differentiate


def mapped(mesh: Mesh) -> Gradients:
    """Return gradients by `jax.shard_map`: each device of its part of the batch, and the mean of all."""

    def differentiate(model: Any, images: Any, targets: Any) -> tuple[jax.Array, Any]:
        graph, parameters, rest = nnx.split(model, nnx.Param, ...)

        def share(parameters: Any, rest: Any, images: Any, targets: Any) -> tuple[Any, Any, Any]:
            def loss(parameters: Any) -> tuple[jax.Array, Any]:
                model = nnx.merge(graph, parameters, rest, copy=True)
                value = jax.lax.pmean(loss_of(model, images, targets, box=(0, 0, 0, 0)), "data")
                return value, nnx.state(model, nnx.BatchStat)

            (value, statistics), gradients = jax.value_and_grad(loss, has_aux=True)(parameters)
            return value, statistics, gradients

        data, whole = PartitionSpec("data"), PartitionSpec()
        value, statistics, gradients = jax.shard_map(
            share, mesh=mesh, in_specs=(whole, whole, data, data), out_specs=whole
        )(parameters, rest, images, targets)
        nnx.update(model, statistics)
        return value, gradients

    return differentiate


def unmixed(model: Any, images: Any, targets: Any) -> tuple[jax.Array, Any]:
    return nnx.value_and_grad(lambda model: loss_of(model, images, targets, box=(0, 0, 0, 0)))(model)


def compared(names: Sequence[str]) -> dict[str, Any]:
    """Return how far training on eight devices is from that on one, by how they share the work."""
    data = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    two = jax.make_mesh((2, DEVICES // 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    # How gradients are computed on one device, and what is compared with it.
    ways: dict[str, tuple[Gradients, dict[str, Any], Callable[[], Outcome]]] = {
        "data": (by_the_compiler, {}, lambda: trained(*on_mesh(data, "data"))),
        "fsdp": (by_the_compiler, {}, lambda: trained(*on_mesh(data, "fsdp"), by_gathered_weights(data))),
        "tensor": (by_the_compiler, {}, lambda: trained(*on_mesh(two, "tensor"))),
        "shard_map": (unmixed, {}, lambda: trained(*on_mesh(data, "data", axis_name="data"), mapped(data))),
        "ghosts": (unmixed, {"ghost_batches": 2}, lambda: trained(*on_mesh(data, "data", ghost_batches=2), unmixed)),
    }
    one: dict[Any, Outcome] = {}
    found = {}
    for name in names:
        differentiate, options, run = ways[name]
        key = (differentiate, *options)
        if key not in one:
            one[key] = trained(make(**options), *batch(), differentiate)
        found[name] = distance(run(), one[key])
    return found


def main(names: str, process: int = 0, processes: int = 1, port: int = 0) -> None:
    if processes > 1:
        jax.distributed.initialize(f"localhost:{port}", processes, process)
    jax.config.update("jax_enable_x64", True)
    found = compared(names.split(","))
    print(json.dumps(found | in_files() if processes > 1 else found))


def in_files() -> dict[str, Any]:
    """Return what comes of saving and loading weights and training that several processes share."""
    folder = Path(sys.argv[5])
    data = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    model, *_ = on_mesh(data, "fsdp")
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    drawn = draw_weights(CONFIG)
    outlook_jax.save_weights(model, folder / "weights.safetensors")
    outlook_jax.save_training(model, optimizer, folder / "training.safetensors", step=7)
    before = [leaf.sharding for leaf in jax.tree.leaves((nnx.state(model), nnx.state(optimizer)))]
    outlook_jax.load_weights(model, folder / "weights.safetensors")
    step = outlook_jax.load_training(model, optimizer, folder / "training.safetensors")
    after = [leaf.sharding for leaf in jax.tree.leaves((nnx.state(model), nnx.state(optimizer)))]
    exported = outlook_jax.export_weights(model)
    refused = ""
    try:
        outlook_jax.save_weights(model, folder / "missing" / "weights.safetensors")
    except OSError as error:
        refused = str(error)
    return {
        "exported": all(np.array_equal(exported[name], array) for name, array in drawn.items()),
        "step": step,
        "counted": int(gathered(optimizer.step.get_value())),
        "kept": before == after,
        "refused": refused,
    }


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]))
