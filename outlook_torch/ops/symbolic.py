"""Sizes that may be symbols, in programs that are compiled, exported or traced."""

from typing import Any

import torch
from torch import Tensor, fx


def is_symbolic(x: Any) -> bool:
    """Say whether torch.fx is tracing: sizes and dtypes of `x` are recorded, and cannot be asked."""
    return isinstance(x, fx.Proxy)


def every(x: Tensor, axis: int, start: int, step: int, count: Any) -> Tensor:
    """Return `count` entries of an axis: start, start + step, and so on; all must exist.

    Of a slice torch.export wants proof that it ends inside the axis, which it cannot find for ceil(H/S) windows; of
    indices it does not.
    """
    if isinstance(count, int):
        return x[(slice(None),) * axis + (slice(start, start + step * (count - 1) + 1, step),)]
    return x.index_select(axis, start + step * torch.arange(count, device=x.device))


def interleaved(phases: list[Tensor], axis: int, start: int, count: int) -> Tensor:
    """Return `count` entries, from `start` on, of an axis whose entry S*c + r is the entry c of the phase r of S."""
    number = start + torch.arange(count, device=phases[0].device)
    phase, cell = number % len(phases), number // len(phases)
    return torch.cat(phases, dim=axis).index_select(axis, phase * phases[0].shape[axis] + cell)
