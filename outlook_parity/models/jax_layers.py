"""This package's JAX layers and losses, as far as the verifier treats them specially."""

from typing import Any

import jax
import jax.numpy as jnp

from outlook_jax import losses
from outlook_jax.batch_norm import BatchNorm
from outlook_jax.blocks import DropPath, DropRate
from outlook_parity.core.dropout import Draws

__all__ = ["ATTRIBUTES", "SWITCHES", "DropPath", "DropRate", "drop_path", "losses"]

# Switches of models under which their modules do not run one by one.
SWITCHES = ("scan_layers", "grad_checkpointing")


def drop_path(module: DropPath, draws: Draws, path: str, x: jax.Array) -> jax.Array:
    """Return what stochastic depth makes of `x` (B, ...), decided by `draws`."""
    keep = 1 - module.rate[...]
    kept = draws.uniform((x.shape[0],) + (1,) * (x.ndim - 1), path) < keep
    return x * (kept / jnp.where(keep > 0, keep, 1)).astype(x.dtype)


def _batch_norm(module: BatchNorm) -> dict[str, Any]:
    return {"eps": float(module.epsilon), "momentum": float(module.momentum)}  # as PyTorch counts it


# Package and type of a module -> reads its attributes.
ATTRIBUTES = {("outlook_jax", "BatchNorm"): _batch_norm}
