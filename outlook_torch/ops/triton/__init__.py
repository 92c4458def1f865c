"""Outlook attention in Triton kernels."""

from outlook_torch.ops.triton.operators import TRITON

__all__ = ["TRITON"]
