"""Weights in and out of a model: files, and arrays under any known naming."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from flax import nnx

from outlook_common.weights.arrays import cast, contiguous, to_numpy
from outlook_common.weights.checkpoint import Source
from outlook_common.weights.files import PathLike, write_arrays
from outlook_common.weights.models import table_for
from outlook_common.weights.resolve import resolve
from outlook_common.weights.table import FLAX

# What of an NNX model's state is weights: parameters and the running statistics of BatchNorm, no random streams.
WEIGHTS = (nnx.Param, nnx.BatchStat)


def load_weights(model: nnx.Module, source: Source, *, prefix: str = "", use_ema: bool = False) -> None:
    """Load every parameter and buffer of `model`, or none of them.

    Args:
        model: one of this package; its parameters keep their dtypes and shardings.
        source: a path, or a mapping of arrays, in PyTorch's, Flax's or External-Attention-pytorch's naming.
        prefix: where in the source the model lies ("network.0.0.attn"); what lies elsewhere is ignored.
        use_ema: take the averaged weights of a checkpoint.

    Raises:
        WeightsError: the source cannot be read or does not fit; everything that is wrong is reported together.
        OSError: the file cannot be opened.
        TypeError: `model` is not one of this package.
    """
    table = table_for(getattr(model, "config", model))
    arrays = resolve(source, table, prefix=prefix, use_ema=use_ema)
    entries = table.names(FLAX)
    loaded = []
    for path, variable in nnx.to_flat_state(nnx.state(model, WEIGHTS)):
        entry, old = entries[path_name(path)], variable.get_value()
        array = contiguous(cast(entry.to_flax(arrays[entry.torch]), old.dtype.name))
        loaded.append((path, variable.replace(jax.device_put(array, old.sharding))))
    nnx.update(model, nnx.from_flat_state(loaded))


def export_weights(model: nnx.Module) -> dict[str, np.ndarray]:
    """Return a copy of every parameter and buffer of `model`, under PyTorch's names and in its layout."""
    state = {path_name(path): variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(model, WEIGHTS))}
    weights = {}
    for entry in table_for(getattr(model, "config", model)).entries:
        array = to_numpy(state[entry.flax])
        weights[entry.torch] = contiguous(entry.to_torch(cast(array, entry.dtype or array.dtype.name)))
    return weights


def save_weights(model: nnx.Module, path: PathLike) -> None:
    """Write the weights of `model` under PyTorch's names; the suffix of `path` decides the format.

    Raises:
        WeightsError: the suffix is unknown.
        OSError: the file cannot be written; what stood there is as it was.
    """
    write_arrays(path, export_weights(model), {"format": "pt"})


def path_name(path: Iterable[Any]) -> str:
    """Return the path of a variable in an NNX state as the weight tables write it."""
    return ".".join(str(step) for step in path)
