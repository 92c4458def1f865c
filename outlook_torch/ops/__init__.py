"""The op and its implementations."""

from outlook_torch.ops.api import IMPLEMENTATIONS, outlook_attention

__all__ = ["IMPLEMENTATIONS", "outlook_attention"]
