"""Outlook attention in PyTorch, the twin of `outlook_jax`."""

from outlook_common.extras import require

require("torch", extra="torch", needed_by="outlook_torch")

from outlook_torch.attention import OutlookAttention  # noqa: E402
from outlook_torch.ops import outlook_attention  # noqa: E402
from outlook_torch.pretrained import from_pretrained  # noqa: E402
from outlook_torch.volo import VOLO, volo  # noqa: E402
from outlook_torch.weights import export_weights, load_weights, save_weights  # noqa: E402

__all__ = [
    "VOLO",
    "OutlookAttention",
    "export_weights",
    "from_pretrained",
    "load_weights",
    "outlook_attention",
    "save_weights",
    "volo",
]
