"""Metadata that this package writes into checkpoints."""

import json
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from outlook_common.weights.tables.base import FLAX, TORCH, WeightTable

# What is written here starts so.
OURS = "outlook."
# The key by which other programs recognise whose names a .safetensors file holds.
FORMAT = "format"
_FORMAT_OF_NAMING = {FLAX: "flax"}


def own_metadata(model: str, config: dict[str, Any], naming: str) -> dict[str, str]:
    """Return what says of a file which model it is of.

    Args:
        model: its name.
        config: its configuration, as JSON can hold it.
        naming: of the tensors.
    """
    try:
        own_version = version("outlook-attention")
    except PackageNotFoundError:  # a checkout that is not installed
        own_version = "unknown"
    return {
        f"{OURS}version": own_version,
        f"{OURS}model": model,
        f"{OURS}config": json.dumps(config),
        FORMAT: _FORMAT_OF_NAMING.get(naming, "pt"),
    }


def metadata_of(config: Any, table: WeightTable) -> dict[str, str]:
    """Return the metadata of a model's weights under PyTorch's names."""
    return own_metadata(table.model, asdict(config), TORCH)
