"""What says of a checkpoint which model it is: `config.json`, in timm's words, and this package's metadata."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from outlook_common.config import VOLO_VARIANTS, VOLOConfig, nearest_variant, volo_config, with_tuples
from outlook_common.text import listed
from outlook_common.volo import PREPARATION, pretrained_cfg
from outlook_common.weights.errors import WeightsError
from outlook_common.weights.io import limits

# Sizes in a description beyond which no model is built to compare with.
_MOST_STAGES, _LARGEST = 64, 1 << 20
_LONGEST = limits.NAME_LENGTH * 100

# What metadata keep of a `pretrained_cfg`; the rest follows from the configuration.
KEPT = ("architecture", *PREPARATION)


def model_config(config: VOLOConfig, cfg: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the `config.json` of a model, as timm and `from_pretrained` read it.

    Args:
        config: of the model.
        cfg: its `pretrained_cfg`; empty or None means that of the nearest released variant.
    """
    architecture = architecture_of(config, cfg or {})
    described = pretrained_cfg(architecture, config, cfg)
    del described["license"]  # of the released weights
    return {
        "architecture": described.pop("architecture"),
        "num_classes": config.num_classes,
        "num_features": config.num_features,
        "global_pool": config.global_pool,
        "model_args": changed_fields(config, {"architecture": architecture}),
        "pretrained_cfg": described,
    }


def changed_fields(config: VOLOConfig, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that differ from the released variant that a model is based on, but for its classes."""
    own, released = asdict(config), asdict(VOLO_VARIANTS[architecture_of(config, cfg)].config)
    return {name: value for name, value in own.items() if value != released[name] and name != "num_classes"}


def architecture_of(config: VOLOConfig, cfg: Mapping[str, Any]) -> str:
    """Return the released variant that a model is based on: by its `pretrained_cfg`, else the nearest one."""
    name = cfg.get("architecture")
    return name if isinstance(name, str) and name in VOLO_VARIANTS else nearest_variant(config)


def read_model_config(path: Path, label: str) -> dict[str, Any]:
    """Return what a `config.json` holds.

    Raises:
        WeightsError: it is too long, no JSON or no object.
        OSError: it cannot be read.
    """
    if (size := path.stat().st_size) > limits.HEADER_BYTES:
        raise WeightsError(f"{label}: its config.json is {size} bytes long, at most {limits.HEADER_BYTES} are read")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{label}: its config.json is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{label}: its config.json holds {type(found).__name__}, expected an object")
    return found


def architecture_in(described: Mapping[str, Any]) -> str | None:
    """Return the architecture that a `config.json` names, without the name of its weights; None if it names none."""
    name = described.get("architecture")
    return None if name is None else str(name).partition(".")[0]


def config_in_model_config(described: Mapping[str, Any]) -> VOLOConfig:
    """Return the configuration that a `config.json` holds.

    Raises:
        TypeError: it has fields that a VOLO does not have, or values of other types.
        ValueError: it names no VOLO, or its values are out of range or contradict each other.
    """
    arguments = {} if (found := described.get("model_args")) is None else found
    if not isinstance(arguments, dict):
        raise TypeError(f"model_args is {type(arguments).__name__}, expected an object")
    if large := [name for name, value in arguments.items() if not _is_small(value)]:
        raise ValueError(f"{listed(large)} in model_args: too large, or no numbers")
    return _buildable(volo_config(str(architecture_in(described)), **with_tuples(arguments)))


def config_in_metadata(kind: type, metadata: Mapping[str, str]) -> Any:
    """Return the configuration of this class that `outlook.config` holds; None if it holds none that is valid."""
    found = _json_in(metadata, "outlook.config")
    if not found or not all(map(_is_small, found.values())):
        return None
    try:
        return _buildable(kind(**with_tuples(found)))
    except (TypeError, ValueError, ArithmeticError):
        return None


def pretrained_cfg_in(described: Mapping[str, Any], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the `pretrained_cfg` of a `config.json`, else of the metadata; empty if there is none."""
    found = described.get("pretrained_cfg")
    if isinstance(found, dict) and found:
        return {**found, **({"architecture": name} if (name := architecture_in(described)) else {})}
    return _json_in(metadata, "outlook.pretrained_cfg")


def _json_in(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    text = metadata.get(key, "")
    if not 0 < len(text) <= _LONGEST:
        return {}
    try:
        found = json.loads(text, parse_constant=_refused)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _buildable(config: Any) -> Any:
    """Return a configuration; raise a ValueError if its model has more blocks than a file can have names."""
    if (blocks := sum(getattr(config, "layers", ()))) > limits.NAMES:
        raise ValueError(f"{blocks} blocks, at most {limits.NAMES} are read")
    return config


def _refused(constant: str) -> None:
    raise ValueError(constant)


def _is_small(value: Any) -> bool:
    """Whether a value is plain, or a short list of such, so that its model can be built for comparison."""
    if isinstance(value, list):
        return len(value) <= _MOST_STAGES and all(not isinstance(part, list) and _is_small(part) for part in value)
    return value is None or isinstance(value, str) or (isinstance(value, int | float) and abs(value) <= _LARGEST)
