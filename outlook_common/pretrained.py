"""The part of `from_pretrained` without a framework: find, read, recognise and adapt the weights."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from outlook_common.config import VOLO_VARIANTS, VOLOConfig, volo_config, volo_variant
from outlook_common.geometry import IntOrPair
from outlook_common.images import Preprocessing
from outlook_common.weights.adapt import adapt
from outlook_common.weights.checkpoint import Checkpoint, Shapes, open_checkpoint
from outlook_common.weights.errors import WeightsError
from outlook_common.weights.formats.base import PathLike
from outlook_common.weights.identify import as_in_file, classes_in_file, recognise_volo
from outlook_common.weights.locate import weights_and_config
from outlook_common.weights.tables.volo import variant_of

# The only one of timm's crop modes that is supported.
_CROP_MODE = "center"
# Fields taken from the file's tensors unless overridden.
_OF_FILE = ("img_size", "in_chans")


@dataclass(frozen=True)
class Pretrained:
    """Configuration and weights of a pretrained model, before a twin builds it.

    Attributes:
        source: of the weights, as given.
        variant: the released variant that the configuration is based on.
        config: of the model.
        arrays: under PyTorch's names, in its layout; without those in `fresh`.
        fresh: parameters of heads that the source lacks or has for another class count; they keep initial values.
        described: `pretrained_cfg` of the source's config.json, in timm's words.
    """

    source: str
    variant: str
    config: VOLOConfig
    arrays: dict[str, np.ndarray]
    fresh: tuple[str, ...]
    described: Mapping[str, Any]

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """How images are prepared: from config.json, else from the variant.

        Raises:
            ValueError: config.json requests an unsupported setting.
        """
        mode = self.described.get("crop_mode") or _CROP_MODE
        if mode != _CROP_MODE:
            raise ValueError(f"{self.source}: config.json says crop_mode={mode!r}, only {_CROP_MODE!r} is supported")
        variant = volo_variant(self.variant)

        def setting(name: str) -> Any:
            found = self.described.get(name) or getattr(variant, name)
            return tuple(found) if isinstance(found, list) else found

        names = ("crop_pct", "mean", "std", "interpolation")
        return Preprocessing(self.config.img_size, **{name: setting(name) for name in names})


def prepare(
    source: PathLike,
    *,
    variant: str | None,
    num_classes: int | None,
    img_size: IntOrPair | None,
    prefix: str,
    use_ema: bool,
    revision: str | None,
    token: str | bool | None,
    cache_dir: PathLike | None,
    local_files_only: bool,
    overrides: Mapping[str, Any],
) -> Pretrained:
    """Return what a twin's `from_pretrained` builds its model from; see there for arguments and errors.

    Warns:
        UserWarning: heads are left out or start with fresh weights, by name.
    """
    access = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    source = _hub_id_of_variant(source)
    file, config_file = weights_and_config(source, **access)
    checkpoint = replace(open_checkpoint(file, prefix=prefix, use_ema=use_ema), label=str(source))
    described = {} if config_file is None else _read_config(config_file, checkpoint)
    shapes = checkpoint.shapes
    classes = classes_in_file(shapes)
    expected = described.get("num_classes")
    if expected is not None and expected != classes:
        raise WeightsError(
            f"{source}: config.json says num_classes={expected}, but the weights are for {classes} classes"
        )

    name = variant or _described_variant(described, checkpoint) or _recognised_variant(shapes, checkpoint)
    arguments = dict(described.get("model_args") or {}) if variant is None else {}
    requested = dict(overrides) if img_size is None else {**overrides, "img_size": img_size}
    arguments |= {"num_classes": classes if num_classes is None else num_classes, **requested}
    config = volo_config(name, **arguments)
    if variant is None:
        own = as_in_file(config, shapes)
        config = replace(config, **{field: getattr(own, field) for field in _OF_FILE if field not in requested})

    adapted = adapt(checkpoint, config)
    if adapted.change:
        counts = f"its weights are for {classes} classes, the model for {config.num_classes}"
        warnings.warn(f"{source}: {counts}: {adapted.change}", UserWarning, stacklevel=3)
    return Pretrained(str(source), name, config, adapted.arrays, adapted.fresh, described.get("pretrained_cfg") or {})


def _hub_id_of_variant(source: PathLike) -> PathLike:
    """Return the Hub id of a released variant if `source` is its name and no file or folder; else `source`."""
    released = isinstance(source, str) and source in VOLO_VARIANTS and not Path(source).exists()
    return VOLO_VARIANTS[str(source)].hub_id if released else source


def _read_config(path: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{checkpoint.label}: its config.json is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{checkpoint.label}: its config.json holds {type(found).__name__}, expected an object")
    return found


def _described_variant(described: Mapping[str, Any], checkpoint: Checkpoint) -> str | None:
    if described.get("architecture") is None:
        return None
    name = str(described["architecture"]).split(".")[0]  # timm appends the name of the weights after a dot
    if name not in VOLO_VARIANTS:
        raise WeightsError(
            f"{checkpoint.label}: config.json says architecture={name!r}; known: {', '.join(VOLO_VARIANTS)}"
        )
    return name


def _recognised_variant(shapes: Shapes, checkpoint: Checkpoint) -> str:
    found = recognise_volo(shapes)
    name = None if found is None else variant_of(found)
    if name is None:
        raise WeightsError(
            f"{checkpoint.label}: its {len(shapes)} tensors fit no released VOLO; for other sizes pass variant= and "
            "the fields that differ from it"
        )
    return name
