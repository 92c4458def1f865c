"""Outlook attention as one local weighted sum per output phase."""

from outlook_jax.ops.composite.sums import COMPOSITE

__all__ = ["COMPOSITE"]
