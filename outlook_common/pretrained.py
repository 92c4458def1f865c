"""What `from_pretrained` does before any framework is needed: find, read, recognise and adapt the weights."""

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
from outlook_common.weights.checkpoint import Checkpoint, open_checkpoint
from outlook_common.weights.errors import WeightsError
from outlook_common.weights.formats.registry import PathLike
from outlook_common.weights.locate import weights_and_config
from outlook_common.weights.tables.volo import as_in_file, classes_in_file, recognise_volo, variant_of

# How timm crops, of its ways the one that is supported here.
_CROP_MODE = "center"
# What a model has as the file has it, unless it is asked for otherwise.
_OF_FILE = ("img_size", "in_chans")


@dataclass(frozen=True)
class Pretrained:
    """A model to be made: its configuration and its weights.

    Attributes:
        source: where the weights are from, as it was given.
        variant: the released one that the configuration is, or was changed from.
        config: of the model.
        arrays: under PyTorch's names, in its layout; without those in `fresh`.
        fresh: names of the heads' parameters that the source has not, or for another number of classes.
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
        """How images are prepared: as config.json says, else as the variant's are.

        Raises:
            ValueError: config.json asks for something that is not supported.
        """
        mode = self.described.get("crop_mode") or _CROP_MODE
        if mode != _CROP_MODE:
            raise ValueError(f"{self.source}: config.json says crop_mode={mode!r}, only {_CROP_MODE!r} is supported")
        variant = volo_variant(self.variant)

        def said(name: str) -> Any:
            found = self.described.get(name) or getattr(variant, name)
            return tuple(found) if isinstance(found, list) else found

        names = ("crop_pct", "mean", "std", "interpolation")
        return Preprocessing(self.config.img_size, **{name: said(name) for name in names})


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
    """Return what a twin's `from_pretrained` makes its model from; for the arguments and errors see there.

    Warns:
        UserWarning: heads are left out or start with fresh weights; it names them.
    """
    access = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    source = _place_of(source)
    file, config_file = weights_and_config(source, **access)
    checkpoint = replace(open_checkpoint(file, prefix=prefix, use_ema=use_ema), label=str(source))
    described = {} if config_file is None else _read_config(config_file, checkpoint)
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in checkpoint.items}
    classes = classes_in_file(shapes)
    said = described.get("num_classes")
    if said is not None and said != classes:
        raise WeightsError(f"{source}: config.json says num_classes={said}, but the weights are for {classes} classes")

    name = variant or _described_variant(described, checkpoint) or _recognised_variant(shapes, checkpoint)
    arguments = dict(described.get("model_args") or {}) if variant is None else {}
    asked = dict(overrides) if img_size is None else {**overrides, "img_size": img_size}
    arguments |= {"num_classes": classes if num_classes is None else num_classes, **asked}
    config = volo_config(name, **arguments)
    if variant is None:
        own = as_in_file(config, shapes)
        config = replace(config, **{field: getattr(own, field) for field in _OF_FILE if field not in asked})

    adapted = adapt(checkpoint, config)
    if adapted.change:
        counts = f"its weights are for {classes} classes, the model for {config.num_classes}"
        warnings.warn(f"{source}: {counts}: {adapted.change}", UserWarning, stacklevel=3)
    return Pretrained(str(source), name, config, adapted.arrays, adapted.fresh, described.get("pretrained_cfg") or {})


def _place_of(source: PathLike) -> PathLike:
    """Return where the weights of a released variant are, if `source` is its name alone and no file or folder's."""
    released = isinstance(source, str) and source in VOLO_VARIANTS and not Path(source).exists()
    return VOLO_VARIANTS[str(source)].hub_id if released else source


def _read_config(path: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{checkpoint.label}: its config.json is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{checkpoint.label}: its config.json holds {type(found).__name__}, expected an object")
    return found


def _described_variant(described: Mapping[str, Any], checkpoint: Checkpoint) -> str | None:
    if described.get("architecture") is None:
        return None
    name = str(described["architecture"]).split(".")[0]  # timm allows the name of the weights behind a dot
    if name not in VOLO_VARIANTS:
        raise WeightsError(
            f"{checkpoint.label}: config.json says architecture={name!r}; known: {', '.join(VOLO_VARIANTS)}"
        )
    return name


def _recognised_variant(shapes: Mapping[str, tuple[int, ...]], checkpoint: Checkpoint) -> str:
    found = recognise_volo(shapes)
    name = None if found is None else variant_of(found)
    if name is None:
        raise WeightsError(
            f"{checkpoint.label}: its {len(shapes)} tensors are of no released VOLO; if they are of one with other "
            "sizes, give variant= and what differs from it"
        )
    return name
