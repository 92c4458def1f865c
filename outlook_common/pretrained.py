"""The part of `from_pretrained` without a framework: find, read, recognise and adapt the weights."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from outlook_common.config import VOLO_VARIANTS, VOLOConfig, changed, nearest_variant, volo_config, volo_variant
from outlook_common.geometry import IntOrPair
from outlook_common.hub import CONFIG_FILE
from outlook_common.images import Preprocessing
from outlook_common.weights.adapt import adapt
from outlook_common.weights.checkpoint import Checkpoint, open_checkpoint
from outlook_common.weights.described import architecture_in, architecture_of, config_in_model_config
from outlook_common.weights.errors import WeightsError
from outlook_common.weights.formats.base import PathLike
from outlook_common.weights.identify import as_in_file, classes_in_file, described_config, recognise_volo
from outlook_common.weights.infer import SHOWN, infer_volo

# The only one of timm's crop modes that is supported.
_CROP_MODE = "center"
# The field that the shapes of tensors do not show, and that has no default.
_HIDDEN = "num_heads"


@dataclass(frozen=True)
class Pretrained:
    """Configuration and weights of a pretrained model, before a twin builds it.

    Attributes:
        source: of the weights, as given.
        variant: the released variant that the configuration is based on.
        config: of the model.
        arrays: under PyTorch's names, in its layout; without those in `fresh`.
        fresh: parameters of heads that the source lacks or has for another class count; they keep initial values.
        described: `pretrained_cfg` of the source's config.json or metadata, in timm's words.
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
    access: dict[str, Any] = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    checkpoint = open_checkpoint(source, prefix=prefix, use_ema=use_ema, **access)
    described, shapes = checkpoint.described, checkpoint.shapes
    classes = classes_in_file(shapes)
    expected = described.get("num_classes")
    if expected is not None and expected != classes:
        raise WeightsError(
            f"{source}: config.json says num_classes={expected}, but the weights are for {classes} classes"
        )

    requested = dict(overrides) if img_size is None else {**overrides, "img_size": img_size}
    requested["num_classes"] = classes if num_classes is None else num_classes
    if variant is not None:
        config = volo_config(variant, **requested)
    else:
        variant, own = _own_config(checkpoint, requested)
        own = as_in_file(own, shapes)
        config = changed(own, **requested)

    adapted = adapt(checkpoint, config)
    if adapted.change:
        counts = f"its weights are for {classes} classes, the model for {config.num_classes}"
        warnings.warn(f"{source}: {counts}: {adapted.change}", UserWarning, stacklevel=3)
    return Pretrained(str(source), variant, config, adapted.arrays, adapted.fresh, checkpoint.pretrained_cfg)


def _own_config(checkpoint: Checkpoint, requested: Mapping[str, Any]) -> tuple[str, VOLOConfig]:
    """Return what a checkpoint says of its model: the released variant that it is based on, and its configuration.

    By `config.json`, by the metadata, by the released architecture that its tensors fit, or by what the tensors show
    and `requested` adds.
    """
    shapes = checkpoint.shapes
    if (name := _described_variant(checkpoint)) is not None:
        try:
            return name, config_in_model_config(checkpoint.described)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise WeightsError(f"{checkpoint.label}: {CONFIG_FILE} describes no VOLO: {error}") from error
    found = described_config(checkpoint)
    if not isinstance(found, VOLOConfig):
        found = recognise_volo(shapes)
    if found is None and _HIDDEN in requested:
        found = infer_volo(shapes)
    if found is None:
        raise WeightsError(_unknown(checkpoint))
    return architecture_of(found, checkpoint.pretrained_cfg), found


def _described_variant(checkpoint: Checkpoint) -> str | None:
    if (name := architecture_in(checkpoint.described)) is None:
        return None
    if name not in VOLO_VARIANTS:
        raise WeightsError(
            f"{checkpoint.label}: config.json says architecture={name!r}; known: {', '.join(VOLO_VARIANTS)}"
        )
    return name


def _unknown(checkpoint: Checkpoint) -> str:
    """Return the message for tensors of which nothing says the configuration: what they show, and what is to add."""
    lacks = f"{checkpoint.where}: its {len(checkpoint.items)} tensors fit no released VOLO"
    if (found := infer_volo(checkpoint.shapes)) is None:
        return f"{lacks}; for other sizes pass variant= and the fields that differ from it"
    default = volo_variant(nearest_variant(found)).config
    shown = ", ".join(
        f"{name}={getattr(found, name)}" for name in SHOWN if getattr(found, name) != getattr(default, name)
    )
    return (
        f"{lacks}, and no {CONFIG_FILE} or metadata say its configuration. They show {shown}, but not {_HIDDEN}, which "
        f"{_HIDDEN}=(…) gives, one number for each of {len(found.layers)} stages; what else they do not show is then "
        "VOLO's default; or pass variant= and the fields that differ from it"
    )
