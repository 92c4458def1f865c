"""Rename a model's tensors from PyTorch's names and layout to another naming."""

from collections.abc import Mapping

from outlook_common.weights.io.lazy import Computed, LazyTensor
from outlook_common.weights.tables.base import FLAX, WeightTable


def rename(tensors: Mapping[str, LazyTensor], table: WeightTable, naming: str) -> dict[str, LazyTensor]:
    """Return {name in `naming`: tensor in that naming's layout}; entries without a tensor are left out.

    Args:
        tensors: under PyTorch's names, in its layout.
        table: of the model.
        naming: to rename to.

    Raises:
        ValueError: the model has no such naming.
    """
    return {
        name: Computed(tensors[entry.torch], tensors[entry.torch].dtype, entry.flax_shape, entry.to_flax)
        if naming == FLAX and entry.layout != "same"
        else tensors[entry.torch]
        for name, entry in table.names(naming).items()
        if entry.torch in tensors
    }
