"""Outlook attention as one local weighted sum per output phase."""

from outlook_torch.ops.composite.sums import COMPOSITE

__all__ = ["COMPOSITE"]
