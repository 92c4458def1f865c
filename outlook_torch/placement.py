"""Tensors that several ranks share: gathered, split, and written by the first rank alone.

`torch.distributed` takes seconds to import, and not every build of PyTorch has it: only once it is needed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def is_shared(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "full_tensor")


def put_like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return a tensor that every rank has whole, or this rank's part of it, as `other` is."""
    if not is_shared(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    shared: Any = other
    mesh = shared.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, shared.placements, src_data_rank=None)


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor; of one that several ranks share all of it, which all of them must ask for."""
    shared: Any = tensor
    found: torch.Tensor = shared.full_tensor() if is_shared(tensor) else tensor
    return found


def write_once(model: nn.Module, write: Callable[[], None]) -> None:
    """Call `write` in the first of the ranks that share the weights; the others wait.

    Raises:
        OSError: in the others, if the first could not.
    """
    if not any(map(is_shared, model.parameters())):
        write()
        return
    import torch.distributed as dist

    failures: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            write()
        except Exception as error:
            dist.broadcast_object_list([str(error)])  # else the others would wait for ever
            raise
    dist.broadcast_object_list(failures)
    if failures[0] is not None:
        raise OSError(f"rank 0 could not write the file: {failures[0]}")
