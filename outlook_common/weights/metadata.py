"""Metadata that this package writes into checkpoints."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from outlook_common.version import __version__
from outlook_common.weights.described import KEPT
from outlook_common.weights.tables.base import FLAX, TORCH, WeightTable

# What is written here starts so.
OURS = "outlook."
# The key by which other programs recognise whose names a .safetensors file holds.
FORMAT = "format"
_FORMAT_OF_NAMING = {FLAX: "flax"}


def own_metadata(model: str, config: dict[str, Any], naming: str, cfg: Mapping[str, Any]) -> dict[str, str]:
    """Return what says of a file which model it is of.

    Args:
        model: its name.
        config: its configuration, as JSON can hold it.
        naming: of the tensors.
        cfg: its `pretrained_cfg`; empty if it has none.
    """
    kept = {name: cfg[name] for name in KEPT if cfg.get(name)}
    return {
        f"{OURS}version": __version__,
        f"{OURS}model": model,
        f"{OURS}config": json.dumps(config),
        **({f"{OURS}pretrained_cfg": json.dumps(kept)} if kept else {}),
        FORMAT: _FORMAT_OF_NAMING.get(naming, "pt"),
    }


def metadata_of(model: Any, table: WeightTable) -> dict[str, str]:
    """Return the metadata of the weights of a twin's model, under PyTorch's names."""
    return own_metadata(table.model, asdict(model.config), TORCH, getattr(model, "pretrained_cfg", {}))
