"""Sizes of a small VOLO: eight devices divide them by `data` and `fsdp`, four by `tensor`. Imports no framework."""

from typing import Any

SIZES: dict[str, Any] = {
    "layers": (1, 2, 1, 1),
    "embed_dims": (16, 32, 32, 32),
    "num_heads": (4, 4, 4, 4),
    "img_size": 32,
    "stem_hidden_dim": 8,
    "num_classes": 8,
}

# The fewest blocks that have every part: an outlooker, transformers that are scanned, class attention.
TWO_STAGES: dict[str, Any] = {
    "layers": (1, 2),
    "embed_dims": (16, 16),
    "num_heads": (4, 4),
    "mlp_ratio": 2.0,
    "downsamples": (True, False),
    "outlook_attention": (True, False),
    "post_layers": ("ca",),
    "patch_size": 4,
    "img_size": 16,
    "stem_hidden_dim": 8,
    "num_classes": 8,
}
