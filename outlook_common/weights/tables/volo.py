"""The weight table of VOLO, from its configuration; and which released variant a file holds."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any

from outlook_common.config import DOWNSAMPLE, FIRST_CONV, STEM_STRIDE, VOLO_VARIANTS, OutlookAttentionConfig, VOLOConfig
from outlook_common.weights.tables.base import Entry, WeightTable, linear_entries

Entries = Iterator[Entry]


@lru_cache(maxsize=64)
def volo_table(config: VOLOConfig) -> WeightTable:
    """Return the table of a `VOLO`: entries in the order of timm's state_dict."""
    return WeightTable(_title(config), tuple(_entries(config)))


def recognise_volo(shapes: Mapping[str, tuple[int, ...]]) -> VOLOConfig | None:
    """Return the configuration of the released architecture that most of a file's tensors belong to, in any naming.

    Class count, image size and channels are those of the file. None unless more than half of the tensors belong to one.
    """
    best, most = None, len(shapes) / 2
    if sum(name in _known_names() for name in shapes) <= most:
        return None
    for variant in VOLO_VARIANTS.values():
        for expected in _expected_shapes(variant.config):
            shared = sum(expected.get(name) == shape for name, shape in shapes.items())
            if shared > most:
                best, most = variant.config, shared
    return None if best is None else as_in_file(best, shapes)


@lru_cache
def _expected_shapes(config: VOLOConfig) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Return the shapes by PyTorch's names and by Flax's."""
    entries = volo_table(config).entries
    return {entry.torch: entry.shape for entry in entries}, {entry.flax: entry.flax_shape for entry in entries}


@cache
def _known_names() -> frozenset[str]:
    return frozenset(
        name for variant in VOLO_VARIANTS.values() for names in _expected_shapes(variant.config) for name in names
    )


def variant_of(config: VOLOConfig) -> str | None:
    """Return the released variant of this architecture, of this image size if there is one; None if there is none.

    Class count and channels of the images do not matter.
    """
    same = [name for name, variant in VOLO_VARIANTS.items() if _architecture(variant.config) == _architecture(config)]
    return next((name for name in same if VOLO_VARIANTS[name].config.img_size == config.img_size), (*same, None)[0])


def _architecture(config: VOLOConfig) -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if name not in ("img_size", "num_classes", "in_chans")}


def classes_in_file(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return how many classes the weights of a VOLO are for, 0 without classifier; any naming."""
    for name, axes, axis in (("head.bias", 1, 0), ("head.weight", 2, 0), ("head.kernel", 2, 1)):
        if len(shape := shapes.get(name, ())) == axes:
            return shape[axis]
    return 0


def size_in_file(shapes: Mapping[str, tuple[int, ...]], config: VOLOConfig) -> tuple[int, int]:
    """Return the image size in pixels that the weights of a VOLO are for, any naming; else that of the config."""
    shape = shapes.get("pos_embed", ())
    if len(shape) != 4 or min(shape) < 1:
        return config.img_size
    return shape[1] * config.stride, shape[2] * config.stride


def channels_in_file(shapes: Mapping[str, tuple[int, ...]], config: VOLOConfig) -> int:
    """Return how many channels images have for the weights of a VOLO, any naming; else that of the config."""
    for name, axis in ((f"{FIRST_CONV}.weight", 1), (f"{FIRST_CONV}.kernel", 2)):
        shape = shapes.get(name, ())
        if len(shape) == 4 and shape[axis] > 0:
            return shape[axis]
    return config.in_chans


def norm_entries(name: str, features: int) -> tuple[Entry, ...]:
    """Return the entries of a LayerNorm with this path."""
    return (
        Entry(f"{name}.weight", f"{name}.scale", (features,)),
        Entry(f"{name}.bias", f"{name}.bias", (features,)),
    )


def batch_norm_entries(name: str, features: int) -> tuple[Entry, ...]:
    """Return the entries of a BatchNorm with this path: parameters, running statistics, counter."""
    return (
        *norm_entries(name, features),
        Entry(f"{name}.running_mean", f"{name}.mean", (features,)),
        Entry(f"{name}.running_var", f"{name}.var", (features,)),
        Entry(f"{name}.num_batches_tracked", f"{name}.num_batches_tracked", (), dtype="int64"),
    )


def conv_entries(
    name: str, features_in: int, features_out: int, kernel_size: int, *, bias: bool = True
) -> tuple[Entry, ...]:
    """Return the entries of a convolution with this path and a square kernel."""
    shape = (features_out, features_in, kernel_size, kernel_size)
    kernel = Entry(f"{name}.weight", f"{name}.kernel", shape, "conv")
    return (kernel, Entry(f"{name}.bias", f"{name}.bias", (features_out,))) if bias else (kernel,)


def _title(config: VOLOConfig) -> str:
    rows, columns = config.img_size
    if (name := variant_of(config)) is None:
        sizes = f"layers={config.layers}, embed_dims={config.embed_dims}, img_size={rows}x{columns}"
        return f"VOLO({sizes}, num_classes={config.num_classes})"
    released = VOLO_VARIANTS[name].config
    changes = [f"img_size={rows}x{columns}"] if config.img_size != released.img_size else []
    changes += [
        f"{size}={getattr(config, size)}"
        for size in ("num_classes", "in_chans")
        if getattr(config, size) != getattr(released, size)
    ]
    return " with ".join([name, *([", ".join(changes)] if changes else [])])


def as_in_file(config: VOLOConfig, shapes: Mapping[str, tuple[int, ...]]) -> VOLOConfig:
    """Return a configuration with the class count, image size and channels of a file; any naming."""
    return replace(
        config,
        num_classes=classes_in_file(shapes),
        img_size=size_in_file(shapes, config),
        in_chans=channels_in_file(shapes, config),
    )


def _entries(config: VOLOConfig) -> Entries:
    features = config.num_features
    yield Entry("pos_embed", "pos_embed", (1, *config.token_map, features))
    if config.post_layers is not None:
        yield Entry("cls_token", "cls_token", (1, 1, features))
    yield from _patch_embed(config)
    for index, part in enumerate(config.network):
        if part.kind == "downsample":
            dim, following = config.embed_dims[part.stage : part.stage + 2]
            yield from conv_entries(f"network.{index}.proj", dim, following, DOWNSAMPLE)
            continue
        attention = _outlook_attention if part.kind == "outlooker" else _attention
        for block in range(config.layers[part.stage]):
            yield from _block(f"network.{index}.{block}", config, part.stage, attention)
    for block in range(len(config.post_layers or ())):
        yield from _block(f"post_network.{block}", config, -1, _class_attention)
    if config.use_aux_head and config.num_classes > 0:
        yield from linear_entries("aux_head", features, config.num_classes)
    yield from norm_entries("norm", features)
    if config.num_classes > 0:
        yield from linear_entries("head", features, config.num_classes)


def _patch_embed(config: VOLOConfig) -> Entries:
    hidden = config.stem_hidden_dim
    for index, (features_in, kernel_size) in enumerate(((config.in_chans, 7), (hidden, 3), (hidden, 3))):
        # Convolution, normalisation and activation take three places; the last has no parameters.
        yield from conv_entries(f"patch_embed.conv.{3 * index}", features_in, hidden, kernel_size, bias=False)
        yield from batch_norm_entries(f"patch_embed.conv.{3 * index + 1}", hidden)
    yield from conv_entries("patch_embed.proj", hidden, config.embed_dims[0], config.patch_size // STEM_STRIDE)


def _block(name: str, config: VOLOConfig, stage: int, attention: Callable[[str, VOLOConfig, int], Entries]) -> Entries:
    dim = config.embed_dims[stage]
    hidden = int(dim * config.mlp_ratio[stage])
    yield from norm_entries(f"{name}.norm1", dim)
    yield from attention(f"{name}.attn", config, stage)
    yield from norm_entries(f"{name}.norm2", dim)
    yield from linear_entries(f"{name}.mlp.fc1", dim, hidden)
    yield from linear_entries(f"{name}.mlp.fc2", hidden, dim)


def _outlook_attention(name: str, config: VOLOConfig, stage: int) -> Entries:
    dim = config.embed_dims[stage]
    layer = OutlookAttentionConfig(dim, config.num_heads[stage], config.out_kernel)
    yield from linear_entries(f"{name}.v", dim, dim, bias=config.qkv_bias)
    yield from linear_entries(f"{name}.attn", dim, layer.attn_features)
    yield from linear_entries(f"{name}.proj", dim, dim)


def _attention(name: str, config: VOLOConfig, stage: int) -> Entries:
    dim = config.embed_dims[stage]
    yield from linear_entries(f"{name}.qkv", dim, 3 * dim, bias=config.qkv_bias)
    yield from linear_entries(f"{name}.proj", dim, dim)


def _class_attention(name: str, config: VOLOConfig, stage: int) -> Entries:
    dim = config.embed_dims[stage]
    yield from linear_entries(f"{name}.kv", dim, 2 * dim, bias=config.qkv_bias)
    yield from linear_entries(f"{name}.q", dim, dim, bias=config.qkv_bias)
    yield from linear_entries(f"{name}.proj", dim, dim)
