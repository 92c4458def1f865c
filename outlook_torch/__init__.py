"""Outlook attention in PyTorch, the twin of `outlook_jax`."""

from typing import TYPE_CHECKING

from outlook_common.extras import require
from outlook_common.lazy import lazily
from outlook_common.version import __version__

require("torch", needed_by="outlook_torch")

from outlook_common.models import list_models  # noqa: E402
from outlook_torch.attention import OutlookAttention  # noqa: E402
from outlook_torch.model import VOLO, volo  # noqa: E402
from outlook_torch.ops import outlook_attention  # noqa: E402

if TYPE_CHECKING:
    from outlook_torch.acceleration import accelerate, restore
    from outlook_torch.explain import attention_maps
    from outlook_torch.folding import fold_batch_norm
    from outlook_torch.pretrained import from_pretrained
    from outlook_torch.saving import push_to_hub, save_pretrained
    from outlook_torch.sharding import fsdp_plan, fully_shard
    from outlook_torch.training import load_training, save_training
    from outlook_torch.weights import export_weights, load_weights, save_weights

__all__ = [
    "VOLO",
    "OutlookAttention",
    "__version__",
    "accelerate",
    "attention_maps",
    "export_weights",
    "fold_batch_norm",
    "from_pretrained",
    "fsdp_plan",
    "fully_shard",
    "list_models",
    "load_training",
    "load_weights",
    "outlook_attention",
    "push_to_hub",
    "restore",
    "save_pretrained",
    "save_training",
    "save_weights",
    "volo",
]

if not TYPE_CHECKING:  # a type checker would take any name
    __getattr__ = lazily(
        __name__,
        {
            "accelerate": "acceleration",
            "attention_maps": "explain",
            "export_weights": "weights",
            "fold_batch_norm": "folding",
            "from_pretrained": "pretrained",
            "fsdp_plan": "sharding",
            "fully_shard": "sharding",
            "load_training": "training",
            "load_weights": "weights",
            "restore": "acceleration",
            "push_to_hub": "saving",
            "save_pretrained": "saving",
            "save_training": "training",
            "save_weights": "weights",
        },
    )
