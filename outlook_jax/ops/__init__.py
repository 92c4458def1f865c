"""The op and its implementations."""

from outlook_jax.ops.api import IMPLEMENTATIONS, outlook_attention

__all__ = ["IMPLEMENTATIONS", "outlook_attention"]
