"""Outlook attention in PyTorch, the twin of `outlook_jax`."""

from outlook_common.extras import require

require("torch", extra="torch", needed_by="outlook_torch")

from outlook_torch.acceleration import accelerate, restore  # noqa: E402
from outlook_torch.attention import OutlookAttention  # noqa: E402
from outlook_torch.explain import attention_maps  # noqa: E402
from outlook_torch.folding import fold_batch_norm  # noqa: E402
from outlook_torch.model import VOLO, volo  # noqa: E402
from outlook_torch.ops import outlook_attention  # noqa: E402
from outlook_torch.pretrained import from_pretrained  # noqa: E402
from outlook_torch.sharding import fsdp_plan, fully_shard  # noqa: E402
from outlook_torch.training import load_training, save_training  # noqa: E402
from outlook_torch.weights import export_weights, load_weights, save_weights  # noqa: E402

__all__ = [
    "VOLO",
    "OutlookAttention",
    "accelerate",
    "attention_maps",
    "export_weights",
    "fold_batch_norm",
    "from_pretrained",
    "fsdp_plan",
    "fully_shard",
    "load_training",
    "load_weights",
    "outlook_attention",
    "restore",
    "save_training",
    "save_weights",
    "volo",
]
