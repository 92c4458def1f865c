"""Load, export and save the weights and the training state of a model."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, NamedSharding

from outlook_common.arrays import cast, contiguous, to_numpy
from outlook_common.volo import check_complete
from outlook_common.weights.checkpoint import Source
from outlook_common.weights.formats.registry import PathLike, write_arrays
from outlook_common.weights.identify import check_weights_of, table_for
from outlook_common.weights.match import resolve
from outlook_common.weights.tables.base import FLAX, Entry, WeightTable
from outlook_common.weights.training import MOMENTS, Training, read_training, refuse_moments, write_training

# Kinds of variables that are weights: parameters and running statistics, no random streams.
WEIGHTS = (nnx.Param, nnx.BatchStat)


def load_weights(model: nnx.Module, source: Source, *, prefix: str = "", use_ema: bool = False) -> None:
    """Load all parameters and buffers of `model`; on error, none.

    Args:
        model: one of this package; its parameters keep their dtypes and shardings.
        source: a path, or a mapping of arrays, in PyTorch's, Flax's or External-Attention-pytorch's naming.
        prefix: of the model's names in the source ("network.0.0.attn"); other names are ignored.
        use_ema: whether to take the averaged weights of a checkpoint.

    Raises:
        WeightsError: the source cannot be read or does not fit; all faults are reported together.
        OSError: the file cannot be opened.
        TypeError: `model` is not one of this package, or has other weights than its configuration says.
    """
    table = table_of(model)
    arrays = resolve(source, table, prefix=prefix, use_ema=use_ema)
    entries = table.names(FLAX)
    loaded = []
    for path, variable in nnx.to_flat_state(nnx.state(model, WEIGHTS)):
        entry, old = entries[path_name(path)], variable.get_value()
        array = contiguous(cast(entry.to_flax(arrays[entry.torch]), old.dtype.name))
        loaded.append((path, variable.replace(put_like(array, old))))
    nnx.update(model, nnx.from_flat_state(loaded))


def export_weights(model: nnx.Module) -> dict[str, np.ndarray]:
    """Return a copy of every parameter and buffer of `model`, under PyTorch's names and in its layout.

    Weights that several processes share are gathered, one after the other: all of these must call it.
    """
    state = {path_name(path): variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(model, WEIGHTS))}
    weights = {}
    for entry in table_of(model).entries:
        array = gathered(state[entry.flax])
        weights[entry.torch] = contiguous(entry.to_torch(cast(array, entry.dtype or array.dtype.name)))
    return weights


def save_weights(model: nnx.Module, path: PathLike) -> None:
    """Write the weights of `model` under PyTorch's names; the suffix of `path` decides the format.

    If several processes share the weights, all of them must call it, and the first writes.

    Raises:
        WeightsError: the suffix is unknown.
        OSError: the file cannot be written; an existing file is unchanged.
    """
    weights = export_weights(model)
    write_once(model, lambda: write_arrays(path, weights, {"format": "pt"}))


def path_name(path: Iterable[Any]) -> str:
    """Return the path of a variable in an NNX state as the weight tables write it."""
    return ".".join(str(step) for step in path)


# Optax's name of each kind of moment -> PyTorch's.
_KINDS = {optax_name: torch_name for torch_name, optax_name in MOMENTS.items()}
# Names of step counters in Flax's optimizer and in Optax's states.
_COUNTS = ("step", "count")


def save_training(model: nnx.Module, optimizer: nnx.Optimizer[Any], path: PathLike, *, step: int | None = None) -> None:
    """Write weights, optimizer moments and step, to resume training in either framework.

    Hyperparameters, schedules and random streams are not written. If several processes share the weights, all of them
    must call it, and the first writes.

    Args:
        model: one of this package.
        optimizer: of `optax.adam`, `adamw` or `sgd`, alone or in a chain, of parameters of `model`.
        path: its suffix decides the format.
        step: how many steps were made; None means as many as the optimizer has counted.

    Raises:
        ValueError: the optimizer has other parameters.
        TypeError: the optimizer keeps something else than those do.
        WeightsError: the suffix is unknown.
        OSError: the file cannot be written; an existing file is unchanged.
    """
    moments: dict[str, dict[str, np.ndarray]] = {}
    for kind, entry, _, variable in _moments(model, optimizer):
        moments.setdefault(kind, {})[entry.torch] = contiguous(entry.to_torch(gathered(variable.get_value())))
    counted = int(gathered(optimizer.step.get_value())) if step is None else step
    training = Training(export_weights(model), moments, counted)
    write_once(model, lambda: write_training(path, training))


def load_training(model: nnx.Module, optimizer: nnx.Optimizer[Any], path: PathLike) -> int:
    """Load a file of either twin's `save_training`, all or nothing; return the number of steps.

    Args:
        model: one of this package; its parameters keep their dtypes and shardings.
        optimizer: of `optax.adam`, `adamw` or `sgd`, alone or in a chain, of parameters of `model`.
        path: the file.

    Raises:
        WeightsError: the file does not fit the model or the optimizer.
        ValueError: the optimizer has other parameters.
        TypeError: the optimizer keeps something else than those do.
        OSError: the file cannot be opened.
    """
    slots = list(_moments(model, optimizer))
    table, kinds = table_of(model), {kind for kind, *_ in slots}
    training = read_training(path, table, kinds, _trained(model, optimizer))
    load_weights(model, training.weights)
    loaded = []
    for kind, entry, at, variable in slots:
        old = variable.get_value()
        array = contiguous(cast(entry.to_flax(training.moments[kind][entry.torch]), old.dtype.name))
        loaded.append((at, variable.replace(put_like(array, old))))
    for at, variable in nnx.to_flat_state(nnx.state(optimizer)):
        if at[-1] in _COUNTS and variable.get_value().shape == ():
            old = variable.get_value()
            loaded.append((at, variable.replace(put_like(np.asarray(training.step, old.dtype), old))))
    nnx.update(optimizer, nnx.from_flat_state(loaded))
    return training.step


def _moments(model: nnx.Module, optimizer: nnx.Optimizer[Any]) -> Iterator[tuple[str, Entry, Any, Any]]:
    """Yield (kind, parameter, path in the optimizer's state, variable) of every moment that an optimizer keeps."""
    entries = table_of(model).names(FLAX)
    unknown = []
    for at, variable in nnx.to_flat_state(nnx.state(optimizer)):
        names = [step for step in at[1:] if isinstance(step, str)]
        if at[-1] in _COUNTS and variable.get_value().shape == ():
            continue
        slot, parameter = (names[0], path_name(at[at.index(names[0]) + 1 :])) if names else ("", "")
        if slot not in _KINDS:
            unknown.append(path_name(at[1:]))
        elif parameter not in entries:
            raise ValueError(f"the optimizer's {parameter} is not of this model")
        else:
            yield _KINDS[slot], entries[parameter], at, variable
    refuse_moments(unknown)


def _trained(model: nnx.Module, optimizer: nnx.Optimizer[Any]) -> set[str]:
    """Return PyTorch's names of the parameters of an optimizer."""
    entries = table_of(model).names(FLAX)
    flat = nnx.to_flat_state(nnx.state(model, optimizer.wrt))
    return {entries[path_name(path)].torch for path, _ in flat}


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
    if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(nnx.state(model, WEIGHTS))):
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


def table_of(model: nnx.Module) -> WeightTable:
    """Return the weight table of `model`; raise a TypeError if it has others than its configuration says."""
    check_complete(model)
    table = table_for(getattr(model, "config", model))
    flat = nnx.to_flat_state(nnx.state(model, WEIGHTS))
    check_weights_of({path_name(path): variable.get_value().shape for path, variable in flat}, table, FLAX)
    return table
