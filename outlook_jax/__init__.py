"""Outlook attention in JAX and Flax, the twin of `outlook_torch`."""

from typing import TYPE_CHECKING

from outlook_common.extras import require
from outlook_common.lazy import lazily
from outlook_common.version import __version__

require("jax", "flax", needed_by="outlook_jax")

from outlook_common.models import list_models  # noqa: E402
from outlook_jax.attention import OutlookAttention  # noqa: E402
from outlook_jax.model import VOLO, volo  # noqa: E402
from outlook_jax.ops import outlook_attention  # noqa: E402

if TYPE_CHECKING:
    from outlook_jax.explain import attention_maps
    from outlook_jax.folding import fold_batch_norm
    from outlook_jax.pretrained import from_pretrained
    from outlook_jax.saving import push_to_hub, save_pretrained
    from outlook_jax.sharding import gather_weights, named_shardings, partition_specs, set_partitioning
    from outlook_jax.training import load_training, save_training
    from outlook_jax.weights import export_weights, load_weights, save_weights

__all__ = [
    "VOLO",
    "OutlookAttention",
    "__version__",
    "attention_maps",
    "export_weights",
    "fold_batch_norm",
    "from_pretrained",
    "gather_weights",
    "list_models",
    "load_training",
    "load_weights",
    "named_shardings",
    "outlook_attention",
    "partition_specs",
    "push_to_hub",
    "save_pretrained",
    "save_training",
    "save_weights",
    "set_partitioning",
    "volo",
]

if not TYPE_CHECKING:  # a type checker would take any name
    __getattr__ = lazily(
        __name__,
        {
            "attention_maps": "explain",
            "export_weights": "weights",
            "fold_batch_norm": "folding",
            "from_pretrained": "pretrained",
            "gather_weights": "sharding",
            "load_training": "training",
            "load_weights": "weights",
            "named_shardings": "sharding",
            "partition_specs": "sharding",
            "push_to_hub": "saving",
            "save_pretrained": "saving",
            "save_training": "training",
            "save_weights": "weights",
            "set_partitioning": "sharding",
        },
    )
