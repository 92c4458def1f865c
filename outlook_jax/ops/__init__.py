"""The op and its implementations."""

from outlook_jax.ops.api import outlook_attention
from outlook_jax.ops.choice import IMPLEMENTATIONS

__all__ = ["IMPLEMENTATIONS", "outlook_attention"]
