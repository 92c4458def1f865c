"""Partition specs of every variable of a model, from the logical axes of its parameters."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from outlook_common.axes import LOGICAL_AXES, MeshAxes, in_flax, logical_axes, mesh_axes, one_or_more, rules_for
from outlook_common.weights.tables.base import FLAX
from outlook_jax.weights import WEIGHTS, path_name, table_of

Rules = str | Mapping[str, MeshAxes]
Module = TypeVar("Module", bound=nnx.Module)


def partition_specs(model: nnx.Module, mesh: Mesh | AbstractMesh, rules: Rules = "data") -> nnx.State[Any, Any]:
    """Return the partition spec of every variable, in the structure of `nnx.state(model)`.

    Args:
        model: one of this package; abstract, as of `nnx.eval_shape`, is enough.
        mesh: the devices.
        rules: "data": every device has all weights. "fsdp": weights are split along their channels, on the mesh's axis
            `fsdp`, else `data`. "tensor": along heads, hidden channels of MLPs and classes, on `model`, else `tensor`.
            Or own ones: logical axis (see `outlook_common.axes`) -> axis of the mesh, several of them, or None.

    Raises:
        ValueError: rules or axes are unknown, or the mesh does not divide the parameters, with all numbers.
        TypeError: `model` is not one of this package.
    """
    table = table_of(model)
    on = mesh_axes(table.entries, dict(mesh.shape), rules)
    make: Any = PartitionSpec
    specs = {entry.flax: make(*in_flax(entry, on[entry.torch])) for entry in table.entries}
    flat = nnx.to_flat_state(nnx.state(model))
    return nnx.from_flat_state(
        (path, variable.replace(specs[path_name(path)] if isinstance(variable, WEIGHTS) else make()))
        for path, variable in flat
    )


def named_shardings(model: nnx.Module, mesh: Mesh, rules: Rules = "data") -> nnx.State[Any, Any]:
    """Return `partition_specs` as shardings on the mesh: for `jax.device_put` and `from_pretrained`."""
    specs = partition_specs(model, mesh, rules)
    shardings: nnx.State[Any, Any] = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    return shardings


def set_partitioning(model: nnx.Module, mesh: Mesh | AbstractMesh, rules: Rules = "data") -> None:
    """Give every parameter Flax's own metadata: its logical axes, the rules and the mesh, as `nnx.with_partitioning`.

    Then `nnx.get_partition_spec` and `nnx.get_named_sharding` of the model's state give what `partition_specs` does,
    and an `nnx.Optimizer` made of the model shards its state likewise. No array is moved.

    Raises:
        ValueError: as `partition_specs`.
        TypeError: likewise.
    """
    table = table_of(model)
    mesh_axes(table.entries, dict(mesh.shape), rules)  # raises where the mesh does not divide them
    by_logical = rules_for(rules, dict(mesh.shape))
    chosen = tuple((logical, one_or_more(by_logical.get(logical, ()))) for logical in LOGICAL_AXES)
    entries = table.names(FLAX)
    for path, variable in nnx.iter_graph(model):
        if isinstance(variable, WEIGHTS):
            entry = entries[path_name(path)]
            axes = in_flax(entry, logical_axes(entry))
            variable.set_metadata(out_sharding=axes, sharding_rules=chosen, mesh=mesh)


def gather_weights(
    model: Module, mesh: Mesh | AbstractMesh, rules: Rules = "fsdp", *, axes: str | Sequence[str] = ("fsdp", "data")
) -> Module:
    """Return a model that computes with whole weights, to call inside a loss: FSDP's all-gather.

    The gradients come back in parts. Without it XLA may keep weights in parts and move activations instead, of the
    whole batch. What the new model writes, such as BatchNorm's statistics, is written to `model`.

    Args:
        model: sharded by these rules.
        mesh: the devices.
        rules: as in `partition_specs`.
        axes: of the mesh, along which the batch lies: weights are gathered along these, and stay split along others.

    Raises:
        ValueError, TypeError: as `partition_specs`.
    """
    along = {axes} if isinstance(axes, str) else set(axes)
    graph, params, *rest = nnx.split(model, nnx.Param, ...)
    specs = nnx.filter_state(partition_specs(model, mesh, rules), nnx.Param)
    gathered = jax.tree.map(
        lambda x, spec: _gather(x, NamedSharding(mesh, _without(spec, along)), NamedSharding(mesh, spec)), params, specs
    )
    return nnx.merge(graph, gathered, *rest)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: jax.Array, whole: NamedSharding, split: NamedSharding) -> jax.Array:
    return _placed(x, whole)


def _gather_forward(x: jax.Array, whole: NamedSharding, split: NamedSharding) -> tuple[jax.Array, None]:
    return _gather(x, whole, split), None


def _gather_backward(whole: NamedSharding, split: NamedSharding, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (_placed(gradient, split),)


_gather.defvjp(_gather_forward, _gather_backward)


def _placed(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    return cast(jax.Array, jax.lax.with_sharding_constraint(x, sharding))  # type: ignore[no-untyped-call]


def _without(spec: PartitionSpec, along: set[str]) -> PartitionSpec:
    """Return a partition spec without these axes of the mesh."""
    kept = [(axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in spec]
    make: Any = PartitionSpec
    return make(*(one_or_more(tuple(axis for axis in axes if axis not in along)) for axes in kept))
