"""Infer a VOLO's configuration from the shapes of its tensors."""

from collections.abc import Iterable
from itertools import count, takewhile
from typing import Any

from outlook_common.config import DOWNSAMPLE, FIRST_CONV, POST_LAYERS, STEM_STRIDE, VOLOConfig
from outlook_common.weights.checkpoint import Shape, Shapes
from outlook_common.weights.tables.base import LAYOUTS

# What the shapes of a VOLO's tensors show. Not the heads of transformers, nor what has no weights.
SHOWN = (
    "layers", "img_size", "in_chans", "num_classes", "patch_size", "stem_hidden_dim", "embed_dims", "downsamples",
    "outlook_attention", "mlp_ratio", "qkv_bias", "post_layers", "use_aux_head", "pooling_scale", "out_kernel",
)  # fmt: skip
# Channels of a transformer's head in every released model.
_HEAD_CHANNELS = 32


def infer_volo(shapes: Shapes) -> VOLOConfig | None:
    """Return the configuration of the VOLO whose tensors have these shapes; None if they are of no VOLO.

    What they do not show (see `SHOWN`) is filled in: heads of 32 channels where they fit, and VOLO's defaults.
    """
    first, patch, position = _conv(shapes, FIRST_CONV), _conv(shapes, "patch_embed.proj"), shapes.get("pos_embed", ())
    if first is None or patch is None or len(position) != 4:
        return None
    parts = list(takewhile(bool, (_part(shapes, f"network.{index}") for index in count())))
    stages = [part for part in parts if part["kind"] != "downsample"]
    if not stages:
        return None
    downsamples = [part["kind"] == "downsample" for part in (*parts[1:], {"kind": ""})]
    post = _blocks(shapes, "post_network")
    patch_size = patch[2] * STEM_STRIDE
    scale = DOWNSAMPLE ** sum(downsamples)
    kernels = {part["kernel"] for part in stages} - {0}
    kernel = min(kernels, default=3)
    try:
        return VOLOConfig(
            tuple(part["blocks"] for part in stages),
            (position[1] * patch_size * scale, position[2] * patch_size * scale),
            first[1],
            _classes(shapes),
            "token" if post else "avg",
            patch_size,
            first[0],
            embed_dims=tuple(part["dim"] for part in stages),
            num_heads=tuple(part["heads"] for part in stages),
            downsamples=tuple(
                down for part, down in zip(parts, downsamples, strict=True) if part["kind"] != "downsample"
            ),
            outlook_attention=tuple(part["kind"] == "outlooker" for part in stages),
            mlp_ratio=tuple(part["ratio"] for part in stages),
            qkv_bias=any(f"network.0.0.attn.{name}.bias" in shapes for name in ("v", "qkv")),
            post_layers=POST_LAYERS[:1] * post if post else None,
            use_aux_head=any(f"aux_head.{leaf}" in shapes for leaf in ("weight", "kernel")),
            pooling_scale=scale,
            out_kernel=kernel,
            out_padding=kernel // 2,
        )
    except (TypeError, ValueError, ArithmeticError):
        return None


def _part(shapes: Shapes, name: str) -> dict[str, Any]:
    """Return what the tensors show of one entry of `network`; empty if there is none."""
    if _conv(shapes, f"{name}.proj") is not None:
        return {"kind": "downsample"}
    blocks = _blocks(shapes, name)
    dim = _size(shapes, f"{name}.0.norm1", ("weight", "scale"))
    hidden = _linear(shapes, f"{name}.0.mlp.fc1")
    if not blocks or not dim or hidden is None:
        return {}
    part = {"blocks": blocks, "dim": dim, "ratio": _ratio(hidden[0], dim)}
    if (logits := _linear(shapes, f"{name}.0.attn.attn")) is None:
        heads = dim // _HEAD_CHANNELS if dim % _HEAD_CHANNELS == 0 else 1
        return part | {"kind": "transformer", "heads": heads, "kernel": 0}
    kernels = (kernel for kernel in (3, 1, 5, 7, 9, 11) if logits[0] % kernel**4 == 0)
    fitting = ((kernel, logits[0] // kernel**4) for kernel in kernels)
    kernel, heads = next(((kernel, heads) for kernel, heads in fitting if heads and dim % heads == 0), (0, 0))
    return part | {"kind": "outlooker", "heads": heads, "kernel": kernel} if kernel else {}


def _ratio(hidden: int, dim: int) -> float:
    """Return the ratio that gives so many hidden channels, which rounding must not make fewer."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else (hidden + 0.5) / dim


def _blocks(shapes: Shapes, name: str) -> int:
    found = (any(f"{name}.{index}.norm1.{leaf}" in shapes for leaf in ("weight", "scale")) for index in count())
    return sum(takewhile(bool, found))


def _classes(shapes: Shapes) -> int:
    head = _linear(shapes, "head")
    return 0 if head is None else head[0]


def _size(shapes: Shapes, name: str, leaves: Iterable[str]) -> int | None:
    found = (shapes.get(f"{name}.{leaf}", ()) for leaf in leaves)
    return next((shape[0] for shape in found if len(shape) == 1), None)


def _conv(shapes: Shapes, name: str) -> Shape | None:
    """Return the shape of a convolution's kernel in PyTorch's layout, in either naming."""
    return _in_torch_layout(shapes, name, "conv", 4)


def _linear(shapes: Shapes, name: str) -> Shape | None:
    return _in_torch_layout(shapes, name, "linear", 2)


def _in_torch_layout(shapes: Shapes, name: str, layout: Any, axes: int) -> Shape | None:
    weight, kernel = shapes.get(f"{name}.weight", ()), shapes.get(f"{name}.kernel", ())
    if len(weight) == axes:
        return weight
    order = LAYOUTS[layout]
    return tuple(kernel[order.index(axis)] for axis in range(axes)) if len(kernel) == axes and order else None
