"""The op and its implementations."""

from outlook_jax.ops.api import CHECKPOINT_NAME, IMPLEMENTATIONS, outlook_attention

__all__ = ["CHECKPOINT_NAME", "IMPLEMENTATIONS", "outlook_attention"]
