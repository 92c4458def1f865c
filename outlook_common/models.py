"""The released models: a table, and their names by pattern and size."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from outlook_common.config import VOLO_VARIANTS

__all__ = ["ReleasedModel", "list_models", "released_models"]


@dataclass(frozen=True)
class ReleasedModel:
    """One row of the table of models.

    Attributes:
        name: of the variant, as `from_pretrained` and `volo` take it.
        parameters: number of trainable parameters.
        multiply_adds: of one image's forward pass; the paper's "FLOPs".
        img_size: (rows, columns) in pixels.
        crop_pct: fraction of the resized image that is kept.
        top1: accuracy on ImageNet-1k's validation set in percent, as published with the weights.
        license: of the weights.
        hub_id: of the weights on the Hugging Face Hub.
    """

    name: str
    parameters: int
    multiply_adds: int
    img_size: tuple[int, int]
    crop_pct: float
    top1: float
    license: str
    hub_id: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict for JSON."""
        return asdict(self)


def released_models() -> list[ReleasedModel]:
    """Return the table of released models, from the smallest to the largest."""
    from outlook_common.flops import multiply_adds, parameters  # here, as the twins import this module

    return [
        ReleasedModel(
            name,
            parameters(variant.config),
            multiply_adds(variant.config),
            variant.config.img_size,
            variant.crop_pct,
            variant.top1,
            variant.license,
            variant.hub_id,
        )
        for name, variant in VOLO_VARIANTS.items()
    ]


def list_models(
    pattern: str | Sequence[str] = "*",
    *,
    img_size: int | None = None,
    max_parameters: float | None = None,
    max_multiply_adds: float | None = None,
    min_top1: float | None = None,
) -> list[str]:
    """Return the names of the released models that match, from the smallest to the largest.

    Args:
        pattern: with the wildcards `*` and `?`, on names ("volo_d1*", "*_224") or Hub ids; of several one must match.
        img_size: side of the images in pixels.
        max_parameters: number of trainable parameters at most (30e6).
        max_multiply_adds: of one image at most (20e9).
        min_top1: published top-1 accuracy in percent at least.
    """
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    return [
        model.name
        for model in released_models()
        if any(fnmatchcase(name, wanted) for name in (model.name, model.hub_id) for wanted in patterns)
        and (img_size is None or model.img_size == (img_size, img_size))
        and (max_parameters is None or model.parameters <= max_parameters)
        and (max_multiply_adds is None or model.multiply_adds <= max_multiply_adds)
        and (min_top1 is None or model.top1 >= min_top1)
    ]
