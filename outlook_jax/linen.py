"""Flax Linen modules of the layer and the model, wrapped by `flax.nnx.bridge`.

Parameters have the same paths as in NNX (`v.kernel`), BatchNorm's statistics are in the collection `batch_stats`.
`rngs` is not given: Linen passes its own, `params` to `init` and `dropout` to `init` and to `apply` in training.
"""

from typing import Any

from flax import nnx

from outlook_common.config import VOLOConfig
from outlook_jax import attention, model

__all__ = ["VOLO", "OutlookAttention"]


def OutlookAttention(*args: Any, **kwargs: Any) -> nnx.bridge.ToLinen:  # noqa: N802 (it stands for a class)
    """Return `outlook_jax.OutlookAttention` as a Linen module; arguments as there, `name` as Linen's."""
    return nnx.bridge.to_linen(attention.OutlookAttention, *args, **kwargs)


def VOLO(config: VOLOConfig, **kwargs: Any) -> nnx.bridge.ToLinen:  # noqa: N802 (it stands for a class)
    """Return `outlook_jax.VOLO` as a Linen module; arguments as there, `name` as Linen's.

    Training (`deterministic=False`, the default) needs `mutable=["batch_stats"]`, evaluation a module made with
    `deterministic=True`.
    """
    return nnx.bridge.to_linen(model.VOLO, config, **kwargs)
