"""Load, export and save the weights of a model."""

import numpy as np
from torch import nn

from outlook_common.arrays import cast, contiguous, to_numpy, to_tensor
from outlook_common.volo import check_complete
from outlook_common.weights.checkpoint import Source
from outlook_common.weights.formats.registry import PathLike, write_arrays
from outlook_common.weights.identify import check_weights_of, table_for
from outlook_common.weights.match import resolve
from outlook_common.weights.metadata import metadata_of
from outlook_common.weights.tables.base import TORCH, WeightTable
from outlook_torch.placement import gathered, put_like, write_once


def load_weights(model: nn.Module, source: Source, *, prefix: str = "", use_ema: bool = False) -> None:
    """Load all parameters and buffers of `model`; on error, none.

    Args:
        model: one of this package, also after `fully_shard`; its parameters keep their dtypes, devices and shards;
            those on the meta device are then on the CPU.
        source: a path, or a mapping of arrays, in PyTorch's, Flax's or External-Attention-pytorch's naming.
        prefix: of the model's names in the source ("network.0.0.attn"); other names are ignored.
        use_ema: whether to take the averaged weights of a checkpoint.

    Raises:
        WeightsError: the source cannot be read or does not fit; all faults are reported together.
        OSError: the file cannot be opened.
        TypeError: `model` is not one of this package, or has other weights than its configuration says.
    """
    arrays = resolve(source, table_of(model), prefix=prefix, use_ema=use_ema)
    state = model.state_dict()
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in state.items()}
    tensors = {name: put_like(to_tensor(cast(array, dtypes[name])), state[name]) for name, array in arrays.items()}
    # There is nothing to copy into on the meta device.
    model.load_state_dict(tensors, assign=any(tensor.is_meta for tensor in state.values()))


def export_weights(model: nn.Module) -> dict[str, np.ndarray]:
    """Return a copy of every parameter and buffer of `model`, under PyTorch's names and in its layout.

    Weights that several ranks share are gathered, one after the other: all of these must call it. BatchNorm's
    statistics are those of the rank.
    """
    state = model.state_dict()
    return {entry.torch: contiguous(to_numpy(gathered(state[entry.torch]))) for entry in table_of(model).entries}


def save_weights(model: nn.Module, path: PathLike) -> None:
    """Write the weights of `model` under PyTorch's names; the suffix of `path` decides the format.

    Its configuration goes into the file's metadata; of `.msgpack` into a file beside it, `….msgpack.outlook.json`. If
    several ranks share the weights, all of them must call it, and rank 0 writes.

    Raises:
        WeightsError: the suffix is unknown.
        OSError: the file cannot be written; an existing file is unchanged.
    """
    weights, metadata = export_weights(model), metadata_of(model, table_of(model))
    write_once(model, lambda: write_arrays(path, weights, metadata))


def table_of(model: nn.Module) -> WeightTable:
    """Return the weight table of `model`; raise a TypeError if it has others than its configuration says."""
    check_complete(model)
    table = table_for(getattr(model, "config", model))
    check_weights_of({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, table, TORCH)
    return table
