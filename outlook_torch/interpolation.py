"""Bicubic resizing where sizes are symbols: compiled and exported programs."""

import torch
from jaxtyping import Float
from torch import Tensor

from outlook_common.interpolation import TAPS, cubic


def symbolic_bicubic_matrix(size: int, new_size: int, device: torch.device) -> Float[Tensor, "new old"]:
    """Return `outlook_common.interpolation.bicubic_matrix`, computed by the program itself for whatever `new_size` is.

    Resizing to the same size is the identity, exactly.
    """
    centre = (torch.arange(new_size, device=device, dtype=torch.float64) + 0.5) * size / new_size - 0.5
    first = centre.floor()
    places = torch.arange(size, device=device)
    matrix = torch.zeros_like(centre)[:, None]
    for tap in TAPS:
        place = (first + tap).clamp(0, size - 1)[:, None] == places
        matrix = matrix + torch.where(place, cubic((centre - (first + tap)).abs(), torch.where)[:, None], 0.0)
    return matrix
