"""A whole training step of a VOLO on a mesh of devices, as shapes: to compile, not to run."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import outlook_jax
from outlook_common.config import VOLOConfig
from outlook_jax.losses import TokenLabelCrossEntropy

Weights = tuple[nnx.State[Any, Any], nnx.State[Any, Any]]  # parameters, statistics


class State(NamedTuple):
    """What a step updates."""

    weights: Weights
    optimizer: optax.OptState


class Step(NamedTuple):
    """A step, and the shapes and shardings of its operands: state, images, targets."""

    run: Any
    operands: tuple[State, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]


def training_step(config: VOLOConfig, batch: int, mesh: Mesh, *, rules: str, dtype: str, remat: bool = False) -> Step:
    """Return AdamW's step on token labels; parameters and moments in float32, the batch along all axes of the mesh.

    Args:
        config: of the model.
        batch: images on all devices together.
        mesh: the devices, also of one.
        rules: "data" or "fsdp".
        dtype: of computing.
        remat: whether blocks are computed again in the backward pass.
    """

    def fresh() -> outlook_jax.VOLO:
        model = outlook_jax.VOLO(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
        if remat:
            model.set_grad_checkpointing()
        return model

    optimizer = optax.adamw(1e-3)
    model = nnx.eval_shape(fresh)
    graph, *states = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
    params, statistics, *streams = states
    shapes = State((params, statistics), jax.eval_shape(optimizer.init, params))
    whole, by_batch = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), (mesh.axis_names,)))
    of_model = outlook_jax.named_shardings(model, mesh, rules)
    of_weights = nnx.filter_state(of_model, nnx.Param), nnx.filter_state(of_model, nnx.BatchStat)
    of_moments = optax.tree_map_params(
        optimizer, lambda _, sharding: sharding, shapes.optimizer, of_weights[0], transform_non_params=lambda _: whole
    )
    shardings = State(of_weights, of_moments)

    def loss_of(
        params: nnx.State[Any, Any], statistics: nnx.State[Any, Any], images: jax.Array, targets: jax.Array
    ) -> Any:
        fixed = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) if _is_plain(x) else jax.random.key(0), streams)
        model = nnx.merge(graph, params, statistics, *fixed, copy=True)
        model = outlook_jax.gather_weights(model, mesh, rules)
        cls, aux, _ = model.forward_train(images, (0, 0, 0, 0))
        return TokenLabelCrossEntropy()((cls, aux, (0, 0, 0, 0)), targets), nnx.state(model, nnx.BatchStat)

    def run(state: State, images: jax.Array, targets: jax.Array) -> tuple[State, jax.Array]:
        (params, statistics), moments = state
        (loss, statistics), gradients = jax.value_and_grad(loss_of, has_aux=True)(params, statistics, images, targets)
        updates, moments = optimizer.update(gradients, moments, params)
        return State((optax.apply_updates(params, updates), statistics), moments), loss

    rows, columns = config.token_map
    images = jax.ShapeDtypeStruct((batch, *config.img_size, config.in_chans), jnp.float32, sharding=by_batch)
    targets = jax.ShapeDtypeStruct((batch, config.num_classes, 2 + rows * columns), jnp.float32, sharding=by_batch)
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings
    )
    return Step(jax.jit(run, donate_argnums=0, out_shardings=(shardings, whole)), (state, images, targets))


def _is_plain(x: Any) -> bool:
    return not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
