"""Checks and decisions shared by the twins' VOLO: images, mixing boxes, intermediates, pruning, losses."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal

from outlook_common.config import FIRST_CONV, VOLOConfig, check_image_size, volo_variant, with_tuples
from outlook_common.geometry import Shape

Layout = Literal["NCHW", "NHWC"]
LAYOUTS = ("NCHW", "NHWC")

# (y1, x1, y2, x2) in tokens, the lower bounds inclusive, the upper exclusive.
MixBox = tuple[Any, Any, Any, Any]

NO_WEIGHT_DECAY = frozenset({"pos_embed", "cls_token"})

# Groups of parameters for layer-wise learning rates: regular expressions on names, alike in both twins, and an ordinal,
# as timm's optimizer factory reads them.
GROUP_MATCHER: dict[str, Any] = {
    "stem": r"^cls_token|pos_embed|patch_embed",
    "blocks": [(r"^network\.(\d+)\.(\d+)", None), (r"^network\.(\d+)", (0,))],
    "blocks2": [(r"^cls_token", (0,)), (r"^post_network\.(\d+)", None), (r"^norm", (99999,))],
}

# Keys of a `pretrained_cfg` on the preparation of images.
PREPARATION = ("crop_pct", "crop_mode", "mean", "std", "interpolation")


def pretrained_cfg(variant: str, config: VOLOConfig, described: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return timm's `pretrained_cfg`: preparation of images, names of the first and last layers.

    Args:
        variant: the released variant that the model is based on.
        config: of the model.
        described: `pretrained_cfg` of a config.json, which takes precedence over the variant's.
    """
    released = volo_variant(variant)
    own = {name: (described or {}).get(name) for name in PREPARATION}
    return {
        "architecture": variant,
        "num_classes": config.num_classes,
        "input_size": (config.in_chans, *config.img_size),
        "crop_pct": released.crop_pct,
        "mean": released.mean,
        "std": released.std,
        "interpolation": released.interpolation,
        "first_conv": FIRST_CONV,
        "classifier": ("head", "aux_head"),
        "license": released.license,
        **with_tuples({name: value for name, value in own.items() if value}),
    }


def check_images(shape: Shape, layout: Layout, config: VOLOConfig) -> None:
    """Check a batch of images against the model.

    Raises:
        ValueError: wrong rank or channels, a side that is not a multiple of the model's stride, or, unless
            `dynamic_img_size`, another size than the model's.
    """
    letters = ", ".join(layout.replace("N", "B"))
    if len(shape) != 4:
        raise ValueError(f"images must have shape ({letters}), got {len(shape)} axes: {tuple(shape)}")
    axis, other = layout.index("C"), LAYOUTS[1 - LAYOUTS.index(layout)].index("C")
    if shape[axis] != config.in_chans:
        hint = (
            f"; axis {other} is {config.in_chans}: are they {_order(other)}?" if shape[other] == config.in_chans else ""
        )
        raise ValueError(
            f"images must have in_chans={config.in_chans} channels on axis {axis}, got shape {tuple(shape)}{hint}"
        )
    size = shape[layout.index("H")], shape[layout.index("W")]
    check_image_size(size, config.stride)
    if not config.dynamic_img_size and size != config.img_size:
        rows, columns = config.img_size
        raise ValueError(
            f"images of {size[0]}x{size[1]} pixels, but the model was made for img_size={rows}x{columns}; "
            "dynamic_img_size=True accepts other sizes"
        )


def _order(channel_axis: int) -> str:
    return "channels first" if channel_axis == 1 else "channels last"


def check_mix_box(box: MixBox, token_map: tuple[int, int]) -> None:
    """Check a mixing box against a map of tokens; bounds traced under `jax.jit` are not checked.

    Raises:
        ValueError: it is not inside the map, or its bounds are not in order.
    """
    for axis, name in enumerate(("rows", "columns")):
        lower, upper = box[axis], box[axis + 2]
        known = all(isinstance(bound, Integral) for bound in (lower, upper))
        if known and not 0 <= lower <= upper <= token_map[axis]:
            raise ValueError(
                f"mix_box (y1, x1, y2, x2) = {tuple(box)} must have 0 <= lower <= upper <= {token_map[axis]} for its "
                f"{name}: the map has {token_map[0]}x{token_map[1]} tokens"
            )


def stage_ends(config: VOLOConfig, parts: int) -> list[int]:
    """Return the index of each stage among the first `parts` parts of the network."""
    return [index for index, part in enumerate(config.network[:parts]) if part.kind != "downsample"]


def take_indices(stages: int, indices: int | Sequence[int] | None) -> tuple[int, ...]:
    """Return the stages selected by `indices`: all for None, the last n for an int, else those listed; -1 is the last.

    Raises:
        ValueError: a stage does not exist, or the list is empty.
    """
    if indices is None:
        return tuple(range(stages))
    if isinstance(indices, int):
        if not 1 <= indices <= stages:
            raise ValueError(f"indices={indices} asks for the last {indices} of {stages} stages")
        return tuple(range(stages - indices, stages))
    for index in indices:
        if not -stages <= index < stages:
            raise ValueError(f"indices={tuple(indices)}: there is no stage {index} among {stages}")
    if not indices:
        raise ValueError("indices is empty; None means every stage")
    return tuple(sorted({index % stages for index in indices}))


@dataclass(frozen=True)
class PrunePlan:
    """What `prune_intermediate_layers` keeps and drops.

    Attributes:
        stages: the requested stages, counted from the first.
        parts: number of parts of the network that stay.
        pos_embed: whether it is dropped; it is added before the third part.
        norm: whether the final norm is dropped; its channels are those from the third part on.
        head: whether class token, class attention blocks and both heads are dropped.
        incomplete: whether weights with released names are then missing.
        config: of the remaining model.
    """

    stages: tuple[int, ...]
    parts: int
    pos_embed: bool
    norm: bool
    head: bool
    incomplete: bool
    config: VOLOConfig


def prune_plan(
    config: VOLOConfig, parts: int, indices: int | Sequence[int] | None, *, prune_norm: bool, prune_head: bool
) -> PrunePlan:
    """Plan the pruning of a model whose network has the first `parts` parts of its configuration.

    Raises:
        ValueError: `indices` select no existing stages.
    """
    ends = stage_ends(config, parts)
    stages = take_indices(len(ends), indices)
    stop = ends[max(stages)]
    early, cut = stop < 2, stop < parts - 1
    head = prune_head or cut
    if head:
        config = replace(
            config, num_classes=0, global_pool="", post_layers=None, use_aux_head=False, use_mix_token=False
        )
    return PrunePlan(stages, stop + 1, early, prune_norm or early, head, cut or prune_norm, config)


def check_layout(output_fmt: str) -> None:
    """Raise a ValueError unless `output_fmt` is a known layout."""
    if output_fmt not in LAYOUTS:
        raise ValueError(f"output_fmt must be one of {', '.join(map(repr, LAYOUTS))}, got {output_fmt!r}")


def check_loss_weights(dense_weight: float, cls_weight: float) -> None:
    """Raise a ValueError unless the weights of a token-labelling loss add up to more than zero."""
    if dense_weight + cls_weight <= 0:
        raise ValueError(
            f"dense_weight + cls_weight must be positive, got dense_weight={dense_weight}, cls_weight={cls_weight}"
        )


def check_repeats(rows: int, targets: int) -> int:
    """Return how often `targets` rows repeat in `rows`; raise a ValueError unless it divides them."""
    if targets == 0 or rows % targets != 0:
        raise ValueError(f"the logits have {rows} rows, which is no multiple of the target's {targets}")
    return rows // targets


def check_foldable(model: object, kind: type, *, training: Callable[[], bool]) -> None:
    """Check that the BatchNorm of `model` can be folded into the convolutions before it.

    Args:
        model: any object.
        kind: the twin's VOLO class.
        training: returns whether `model` is in training mode; called only for a VOLO.

    Raises:
        TypeError: `model` is not a VOLO of this package, or is folded already.
        ValueError: it is in training mode, in which BatchNorm normalises by the batch.
    """
    if not isinstance(model, kind):
        raise TypeError(f"{type(model).__name__} is not a VOLO of this package, so its BatchNorm cannot be folded")
    _check_not_folded(model)
    if training():
        raise ValueError("the model is in training mode, where BatchNorm normalises by the batch: call model.eval()")


def check_complete(model: object) -> None:
    """Raise a TypeError if `model` lacks weights of the released names, since it is folded or pruned."""
    _check_not_folded(model)
    if getattr(model, "pruned", False):
        raise TypeError(
            "the model was pruned by prune_intermediate_layers, so it lacks weights of the released names: load and "
            "save weights before pruning"
        )


def _check_not_folded(model: object) -> None:
    if getattr(model, "batch_norm_folded", False):
        raise TypeError(
            "the model's BatchNorm is folded into its convolutions, so it has no weights of the released names: use "
            "the model that was passed to fold_batch_norm"
        )
