"""Weights in and out of a model: files, and arrays under any known naming."""

import numpy as np
from torch import nn

from outlook_common.weights.arrays import cast, contiguous, to_numpy, to_tensor
from outlook_common.weights.checkpoint import Source
from outlook_common.weights.files import PathLike, write_arrays
from outlook_common.weights.models import table_for
from outlook_common.weights.resolve import resolve


def load_weights(model: nn.Module, source: Source, *, prefix: str = "", use_ema: bool = False) -> None:
    """Load every parameter and buffer of `model`, or none of them.

    Args:
        model: one of this package; its parameters keep their dtypes and devices.
        source: a path, or a mapping of arrays, in PyTorch's, Flax's or External-Attention-pytorch's naming.
        prefix: where in the source the model lies ("network.0.0.attn"); what lies elsewhere is ignored.
        use_ema: take the averaged weights of a checkpoint.

    Raises:
        WeightsError: the source cannot be read or does not fit; everything that is wrong is reported together.
        OSError: the file cannot be opened.
        TypeError: `model` is not one of this package.
    """
    arrays = resolve(source, table_for(getattr(model, "config", model)), prefix=prefix, use_ema=use_ema)
    state = model.state_dict()
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in state.items()}
    model.load_state_dict({name: to_tensor(cast(array, dtypes[name])) for name, array in arrays.items()})


def export_weights(model: nn.Module) -> dict[str, np.ndarray]:
    """Return a copy of every parameter and buffer of `model`, under PyTorch's names and in its layout."""
    state = model.state_dict()
    return {
        entry.torch: contiguous(to_numpy(state[entry.torch]))
        for entry in table_for(getattr(model, "config", model)).entries
    }


def save_weights(model: nn.Module, path: PathLike) -> None:
    """Write the weights of `model` under PyTorch's names; the suffix of `path` decides the format.

    Raises:
        WeightsError: the suffix is unknown.
        OSError: the file cannot be written; what stood there is as it was.
    """
    write_arrays(path, export_weights(model), {"format": "pt"})
