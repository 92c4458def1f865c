"""Sizes of a small VOLO that up to eight devices divide. Imports no framework."""

from typing import Any

SIZES: dict[str, Any] = {
    "layers": (1, 2, 1, 1),
    "embed_dims": (16, 32, 32, 32),
    "num_heads": (4, 4, 4, 4),
    "img_size": 32,
    "stem_hidden_dim": 8,
    "num_classes": 8,
}
