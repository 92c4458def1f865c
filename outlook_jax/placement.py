"""Arrays that several devices or processes share: placed, gathered, and written by the first process alone."""

from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, NamedSharding

from outlook_common.arrays import to_numpy


def put_like(array: np.ndarray, old: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """Put `array` where `old` is; uncommitted if `old` is. Each device gets its own part alone."""
    sharding = old.sharding if getattr(old, "committed", True) else None
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh):  # made under `jax.set_mesh`
        sharding = NamedSharding(jax.sharding.get_mesh(), sharding.spec)
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])


def gathered(array: jax.Array) -> np.ndarray:
    """Return an array of JAX as one of NumPy; what several processes share is whole in each of them afterwards."""
    if array.is_fully_addressable:
        return to_numpy(array)
    if array.is_fully_replicated:
        return to_numpy(array.addressable_data(0))
    return to_numpy(multihost_utils.process_allgather(array, tiled=True))


def write_once(model: nnx.Module, write: Callable[[], None]) -> None:
    """Call `write` in the first of the processes that share the weights; the others wait.

    Raises:
        OSError: in the others, if the first could not.
    """
    if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(nnx.state(model, (nnx.Param, nnx.BatchStat)))):
        write()
        return
    failure: Exception | None = None
    if jax.process_index() == 0:
        try:
            write()
        except Exception as error:  # the others would wait for ever
            failure = error
    failed = multihost_utils.broadcast_one_to_all(np.asarray(failure is not None))
    if failure is not None:
        raise failure
    if failed:
        raise OSError("the first process could not write the file; its own error says why")
