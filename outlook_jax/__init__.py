"""Outlook attention in JAX and Flax, the twin of `outlook_torch`."""

from outlook_common.extras import require

require("jax", extra="jax", needed_by="outlook_jax")
require("flax", extra="jax", needed_by="outlook_jax")

from outlook_jax.attention import OutlookAttention  # noqa: E402
from outlook_jax.explain import attention_maps  # noqa: E402
from outlook_jax.folding import fold_batch_norm  # noqa: E402
from outlook_jax.model import VOLO, volo  # noqa: E402
from outlook_jax.ops import outlook_attention  # noqa: E402
from outlook_jax.pretrained import from_pretrained  # noqa: E402
from outlook_jax.sharding import gather_weights, named_shardings, partition_specs, set_partitioning  # noqa: E402
from outlook_jax.training import load_training, save_training  # noqa: E402
from outlook_jax.weights import export_weights, load_weights, save_weights  # noqa: E402

__all__ = [
    "VOLO",
    "OutlookAttention",
    "attention_maps",
    "export_weights",
    "fold_batch_norm",
    "from_pretrained",
    "gather_weights",
    "load_training",
    "load_weights",
    "named_shardings",
    "outlook_attention",
    "partition_specs",
    "save_training",
    "save_weights",
    "set_partitioning",
    "volo",
]
