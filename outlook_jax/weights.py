"""Load, export and save the weights of a model."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from outlook_common.arrays import cast, contiguous
from outlook_common.text import listed
from outlook_common.volo import check_complete
from outlook_common.weights.checkpoint import Source
from outlook_common.weights.formats.registry import PathLike, write_arrays
from outlook_common.weights.identify import check_weights_of, table_for
from outlook_common.weights.match import resolve
from outlook_common.weights.metadata import metadata_of
from outlook_common.weights.tables.base import FLAX, WeightTable
from outlook_jax.blocks import DropRate
from outlook_jax.placement import gathered, put_like, write_once

# Kinds of variables that are weights: parameters and running statistics, no random streams.
WEIGHTS = (nnx.Param, nnx.BatchStat)


def load_weights(
    model: nnx.Module, source: Source, *, prefix: str = "", use_ema: bool = False, rngs: nnx.Rngs | None = None
) -> None:
    """Load all parameters and buffers of `model`; on error, none.

    Args:
        model: one of this package, also an abstract one of `nnx.eval_shape`; its parameters keep their dtypes and
            shardings.
        source: a path, or a mapping of arrays, in PyTorch's, Flax's or External-Attention-pytorch's naming.
        prefix: of the model's names in the source ("network.0.0.attn"); other names are ignored.
        use_ema: whether to take the averaged weights of a checkpoint.
        rngs: the random streams of an abstract model; streams that are not abstract stay as they are.

    Raises:
        WeightsError: the source cannot be read or does not fit; all faults are reported together.
        OSError: the file cannot be opened.
        TypeError: `model` is not one of this package, or has other weights than its configuration says.
        ValueError: `model` has abstract random streams, and there is no `rngs`.
    """
    table = table_of(model)
    concrete = _concrete(model, rngs)
    arrays = resolve(source, table, prefix=prefix, use_ema=use_ema)
    entries = table.names(FLAX)
    loaded = []
    for path, variable in nnx.to_flat_state(nnx.state(model, WEIGHTS)):
        entry, old = entries[path_name(path)], variable.get_value()
        array = contiguous(cast(entry.to_flax(arrays[entry.torch]), old.dtype.name))
        loaded.append((path, variable.replace(put_like(array, old))))
    nnx.update(model, nnx.from_flat_state([*loaded, *concrete]))


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

    Its configuration goes into the file's metadata; of `.msgpack` into a file beside it, `….msgpack.outlook.json`. If
    several processes share the weights, all of them must call it, and the first writes.

    Raises:
        WeightsError: the suffix is unknown.
        OSError: the file cannot be written; an existing file is unchanged.
    """
    weights, metadata = export_weights(model), metadata_of(model, table_of(model))
    write_once(model, lambda: write_arrays(path, weights, metadata))


def _concrete(model: nnx.Module, rngs: nnx.Rngs | None) -> list[tuple[Any, nnx.Variable[Any]]]:
    """Return the abstract variables that are no weights, with values: random streams, rates of stochastic depth."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.Any(*WEIGHTS))))
    abstract = [(path, variable) for path, variable in flat if _is_abstract(variable)]
    streams = [path_name(path) for path, variable in abstract if isinstance(variable, nnx.RngState)]
    if streams and rngs is None:
        raise ValueError(
            f"the model is abstract, and so are its random streams ({listed(streams, 3)}): pass rngs=nnx.Rngs(seed)"
        )
    config = getattr(model, "config", None)
    return [(path, variable.replace(concrete_value(config, path, variable, rngs))) for path, variable in abstract]


def _is_abstract(variable: Any) -> bool:
    return isinstance(variable, nnx.Variable) and isinstance(variable.get_value(), jax.ShapeDtypeStruct)


def concrete_value(config: Any, path: Any, variable: nnx.Variable[Any], rngs: nnx.Rngs | None) -> Any:
    """Return the value of an abstract variable that is no weight, of a model with this configuration."""
    old = variable.get_value()
    if isinstance(variable, nnx.RngKey):
        assert rngs is not None
        key = rngs.dropout()  # all streams of this package's models
        return jax.random.split(key, old.shape) if old.shape else key
    if isinstance(variable, nnx.RngCount):
        return jnp.zeros(old.shape, old.dtype)
    if isinstance(variable, DropRate):  # network.<part>.<block>.drop_path<1 or 2>.rate
        _, part, block, *_ = path
        return jnp.asarray(config.drop_path_rates(config.network[part].stage)[block], old.dtype)
    raise ValueError(f"{path_name(path)}, a {type(variable).__name__}, is abstract: make it after the model")


def path_name(path: Iterable[Any]) -> str:
    """Return the path of a variable in an NNX state as the weight tables write it."""
    return ".".join(str(step) for step in path)


def table_of(model: nnx.Module) -> WeightTable:
    """Return the weight table of `model`; raise a TypeError if it has others than its configuration says."""
    check_complete(model)
    table = table_for(getattr(model, "config", model))
    flat = nnx.to_flat_state(nnx.state(model, WEIGHTS))
    check_weights_of({path_name(path): variable.get_value().shape for path, variable in flat}, table, FLAX)
    return table
