"""Parameters and multiply-adds of a VOLO, counted from its configuration."""

from math import prod

from outlook_common.config import DOWNSAMPLE, STEM_STRIDE, Part, VOLOConfig
from outlook_common.geometry import grid_size
from outlook_common.weights.tables.volo import volo_table

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
# Sides of the kernels of the stem's convolutions, of which the first strides.
_STEM_KERNELS = (7, 3, 3)


def parameters(config: VOLOConfig) -> int:
    """Return the number of trainable parameters; BatchNorm's statistics are none."""
    return sum(prod(entry.shape) for entry in volo_table(config).entries if not entry.torch.endswith(_BUFFERS))


def multiply_adds(config: VOLOConfig) -> int:
    """Return the multiply-adds of one image's forward pass in evaluation: those of every product and convolution.

    The unit of the paper's column "FLOPs", and of timm's "GMACs". An image has `img_size`; both heads count.
    """
    size = config.img_size[0] // config.patch_size, config.img_size[1] // config.patch_size
    total = _stem(config)
    for part in config.network:
        blocks = 1 if part.kind == "downsample" else config.layers[part.stage]
        total += blocks * _PARTS[part.kind](config, part, size)
        if part.kind == "downsample":
            size = size[0] // DOWNSAMPLE, size[1] // DOWNSAMPLE
    tokens, features = prod(size), config.num_features
    total += len(config.post_layers or ()) * _class_block(config, tokens)
    every = config.global_pool == ""
    classified = tokens + (config.post_layers is not None) if every else 1
    auxiliary = tokens if config.use_aux_head and not every else 0
    return total + (classified + auxiliary) * features * config.num_classes


def _stem(config: VOLOConfig) -> int:
    hidden = config.stem_hidden_dim
    pixels = prod(side // STEM_STRIDE for side in config.img_size)
    inputs = (config.in_chans, hidden, hidden)
    convolutions = sum(channels * side**2 for channels, side in zip(inputs, _STEM_KERNELS, strict=True))
    return pixels * hidden * (convolutions + config.embed_dims[0])  # patches of kernel² pixels do not overlap


def _outlooker(config: VOLOConfig, part: Part, size: tuple[int, int]) -> int:
    dim, places = config.embed_dims[part.stage], prod(config.out_kernel)
    windows = prod(grid_size(side, stride) for side, stride in zip(size, config.out_stride, strict=True))
    logits = windows * dim * config.num_heads[part.stage] * places**2
    return 2 * prod(size) * dim**2 + logits + windows * places**2 * dim + _mlp(config, part.stage, prod(size))


def _transformer(config: VOLOConfig, part: Part, size: tuple[int, int]) -> int:
    dim, tokens = config.embed_dims[part.stage], prod(size)
    return 4 * tokens * dim**2 + 2 * tokens**2 * dim + _mlp(config, part.stage, tokens)


def _downsample(config: VOLOConfig, part: Part, size: tuple[int, int]) -> int:
    return prod(size) * config.embed_dims[part.stage] * config.embed_dims[part.stage + 1]


def _class_block(config: VOLOConfig, tokens: int) -> int:
    """Count one class token that attends to itself and all others."""
    dim = config.num_features
    return 2 * (tokens + 1) * dim**2 + 2 * dim**2 + 2 * (tokens + 1) * dim + _mlp(config, -1, 1)


def _mlp(config: VOLOConfig, stage: int, tokens: int) -> int:
    dim = config.embed_dims[stage]
    return 2 * tokens * dim * int(dim * config.mlp_ratio[stage])


_PARTS = {"outlooker": _outlooker, "transformer": _transformer, "downsample": _downsample}
