"""This package's own twins with the same weights, and photos as their inputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np

from outlook_common.config import OutlookAttentionConfig, VOLOConfig, volo_variant
from outlook_common.extras import require
from outlook_common.geometry import window_grid
from outlook_common.images import preprocess
from outlook_common.pretrained import Pretrained, prepare
from outlook_common.weights.checkpoint import open_checkpoint
from outlook_common.weights.errors import WeightsError
from outlook_common.weights.identify import described_config, recognisable_prefixes, recognise_checkpoint, table_for
from outlook_common.weights.match import resolve_checkpoint
from outlook_common.weights.tables.base import Entry

Arrays = dict[str, np.ndarray]

LAYER = "layer"
DEFAULT_MODEL = "volo_d1_224"
# Window and heads of the layer where neither options nor weights say them.
_KERNEL_SIZE, _STRIDE, _NUM_HEADS = 3, 2, 6
# The map that the layer sees.
_MAP = (28, 28)
IMAGE_CHANNELS = 3
# The size by which a layer is told from a VOLO.
_OUTPUTS = "attn_features"


@dataclass(frozen=True)
class Options:
    """Options of the command line; the window is the layer's. None is what the weights say, else a default."""

    model: str | None
    weights: str | None
    prefix: str
    seed: int
    num_heads: int | None = None
    kernel_size: int | None = None
    stride: int | None = None
    padding: int | None = None


@dataclass(frozen=True)
class Model:
    """Both twins with the same weights, their inputs (channels last), and the photo for a figure."""

    title: str
    torch_model: Any
    jax_model: Any
    inputs: Any
    photo: np.ndarray


# The modules that each needs, and the photos.
FRAMEWORKS = {"torch": ("torch",), "jax": ("jax", "flax")}
PHOTOS = ("sklearn", "PIL")


def make(
    options: Options, frameworks: Sequence[str] = tuple(FRAMEWORKS), *, needed_by: str = "outlook verify"
) -> Model:
    """Return both twins and their inputs; the model of a framework that is not named is None.

    Raises:
        ValueError: the model is unknown, the sizes do not fit each other, or the weights (a `WeightsError`) the model.
        ImportError: something is not installed.
        OSError: the weights cannot be read, or are not on the Hub.
    """
    needed = [module for framework in frameworks for module in FRAMEWORKS[framework]]
    require(*needed, *PHOTOS, needed_by=needed_by)
    return _layer(options, frameworks) if _is_layer(options) else _volo(options, frameworks)


def _is_layer(options: Options) -> bool:
    """Whether a layer is asked for, or no model is and the weights are a layer's."""
    if options.model is not None or options.weights is None:
        return options.model == LAYER
    found = recognise_checkpoint(open_checkpoint(options.weights, prefix=options.prefix))
    return found is not None and _OUTPUTS in found.sizes


def enough_for(model: Model, devices: int) -> Model:
    """Return the model with a batch that so many devices divide: its photos repeated, each time shifted further."""
    batch = len(model.inputs)
    total = -(-batch // devices) * devices
    shifted = [np.roll(model.inputs[n % batch], n // batch, axis=0) for n in range(total)]
    return replace(model, inputs=np.stack(shifted))


def draw_weights(config: OutlookAttentionConfig | VOLOConfig, seed: int = 0) -> Arrays:
    """Draw weights under torch names, large enough that every part of the model, a softmax above all, matters."""
    rng = np.random.default_rng(seed)
    return {entry.torch: _draw(entry, rng) for entry in table_for(config).entries}


def _draw(entry: Entry, rng: np.random.Generator) -> np.ndarray:
    normal, leaf = rng.standard_normal(entry.shape), entry.torch.rpartition(".")[2]
    kind = "scale" if leaf == "weight" and len(entry.shape) == 1 else leaf
    return _DRAWS.get(kind, _half)(normal)


def _half(normal: np.ndarray) -> np.ndarray:
    return 0.5 * normal


# Last part of the name -> weights from standard normal numbers; `_half` for any other.
_DRAWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "weight": lambda normal: 1.5 * normal * np.prod(normal.shape[1:]) ** -0.5,
    "scale": lambda normal: 1 + 0.3 * normal,
    "running_var": lambda normal: np.exp(normal / 2),
    "num_batches_tracked": lambda normal: np.array(3, np.int64),
}


def _build(framework: str, pretrained: Pretrained) -> Any:
    return import_module(f"outlook_{framework}.pretrained").build(pretrained)


def _volo(options: Options, frameworks: Sequence[str]) -> Model:
    from outlook_parity.models.photos import load_photos

    if options.weights is None:
        name = options.model or DEFAULT_MODEL
        config = volo_variant(name).config
        origin = f"random weights, seed {options.seed}"
        pretrained = Pretrained(origin, name, config, draw_weights(config, options.seed), (), {})
    else:
        origin = f"weights of {options.weights}"
        access: dict[str, Any] = {"revision": None, "token": None, "cache_dir": None, "local_files_only": False}
        pretrained = prepare(
            options.weights,
            variant=options.model,
            num_classes=None,
            img_size=None,
            prefix=options.prefix,
            use_ema=False,
            overrides={},
            **access,
        )
    photos = load_photos()
    if (channels := pretrained.config.in_chans) != IMAGE_CHANNELS:
        raise ValueError(
            f"{origin}: a model for images of in_chans={channels} channels, the photos have {IMAGE_CHANNELS}; "
            f"--model {pretrained.variant} adapts the first convolution"
        )
    inputs = np.stack([preprocess(photo, pretrained.preprocessing) for photo in photos])
    return Model(
        title=f"{table_for(pretrained.config).model} on {len(photos)} photos; {origin}",
        torch_model=_build("torch", pretrained) if "torch" in frameworks else None,
        jax_model=_build("jax", pretrained) if "jax" in frameworks else None,
        inputs=inputs,
        photo=np.asarray(photos[0]),
    )


def _layer(options: Options, frameworks: Sequence[str]) -> Model:
    """Return `OutlookAttention` on the photo."""
    from outlook_parity.models.photos import CHANNELS, load_photo, photo_map

    config, arrays = _from_file(options, options.weights) if options.weights else _drawn(options, dim=CHANNELS)
    torch_layer, jax_layer = (_BUILDERS[name](config, arrays) if name in frameworks else None for name in FRAMEWORKS)
    photo = load_photo()
    origin = f"weights of {options.weights}" if options.weights else f"random weights, seed {options.seed}"
    return Model(
        title=f"outlook attention: {config.dim} channels, {config.num_heads} heads, "
        f"kernel {_in_words(config.kernel_size)}, stride {_in_words(config.stride)}; {origin}",
        torch_model=torch_layer,
        jax_model=jax_layer,
        inputs=photo_map(photo, config.dim, options.seed),
        photo=photo,
    )


def _torch_layer(config: OutlookAttentionConfig, weights: Arrays) -> Any:
    import outlook_torch

    layer = outlook_torch.OutlookAttention(*_sizes(config), qk_scale=config.qk_scale)
    outlook_torch.load_weights(layer, weights)
    return layer


def _jax_layer(config: OutlookAttentionConfig, weights: Arrays) -> Any:
    from flax import nnx

    import outlook_jax

    layer = outlook_jax.OutlookAttention(*_sizes(config), qk_scale=config.qk_scale, rngs=nnx.Rngs(0))
    outlook_jax.load_weights(layer, weights)
    return layer


# Framework -> the layer with these weights, in float32.
_BUILDERS: dict[str, Callable[[OutlookAttentionConfig, Arrays], Any]] = {"torch": _torch_layer, "jax": _jax_layer}


def _sizes(config: OutlookAttentionConfig) -> tuple[Any, ...]:
    return config.dim, config.num_heads, config.kernel_size, config.padding, config.stride, config.qkv_bias


def _drawn(options: Options, *, dim: int) -> tuple[OutlookAttentionConfig, Arrays]:
    config = _config(options, dim=dim, num_heads=options.num_heads or _NUM_HEADS, qkv_bias=False)
    return config, draw_weights(config, options.seed)


def _from_file(options: Options, file: str) -> tuple[OutlookAttentionConfig, Arrays]:
    checkpoint = open_checkpoint(file, prefix=options.prefix)
    found = recognise_checkpoint(checkpoint)
    if found is None or _OUTPUTS not in found.sizes:
        prefixes = ", ".join(map(repr, recognisable_prefixes(checkpoint))) or "none"
        raise WeightsError(f"{file}: no outlook attention here; prefixes with a model in this file: {prefixes}")
    asked = options.num_heads, options.kernel_size, options.stride, options.padding
    config = described_config(checkpoint)
    if isinstance(config, OutlookAttentionConfig) and asked == (None,) * len(asked):
        window_grid(_MAP, config.kernel_size, config.stride, config.padding)
        return config, resolve_checkpoint(checkpoint, found.table)
    kernel_size = options.kernel_size or _KERNEL_SIZE
    sizes, positions = found.sizes, kernel_size**2
    num_heads = options.num_heads or max(1, sizes[_OUTPUTS] // positions**2)
    if num_heads * positions**2 != sizes[_OUTPUTS]:
        raise WeightsError(
            f"{file}: attn has {sizes[_OUTPUTS]} outputs, but {num_heads} heads with "
            f"kernel_size={kernel_size} have {num_heads} * {positions}**2 = {num_heads * positions**2}; "
            f"the file fits {_fitting(sizes)}"
        )
    config = _config(options, dim=sizes["dim"], num_heads=num_heads, qkv_bias=bool(sizes["qkv_bias"]))
    return config, resolve_checkpoint(checkpoint, found.table)


def _fitting(sizes: dict[str, int | bool]) -> str:
    fits = [
        f"num_heads={heads} with kernel_size={kernel}"
        for kernel in range(1, int(sizes[_OUTPUTS] ** 0.25) + 1)
        for heads in [sizes[_OUTPUTS] // kernel**4]
        if heads * kernel**4 == sizes[_OUTPUTS] and sizes["dim"] % heads == 0
    ]
    return " or ".join(fits) or "no square window"


def _config(options: Options, *, dim: int, num_heads: int, qkv_bias: bool) -> OutlookAttentionConfig:
    kernel_size, stride = options.kernel_size or _KERNEL_SIZE, options.stride or _STRIDE
    padding = (kernel_size - 1) // 2 if options.padding is None else options.padding
    window_grid(_MAP, kernel_size, stride, padding)  # raises before anything is built
    return OutlookAttentionConfig(dim, num_heads, kernel_size, padding, stride, qkv_bias)


def _in_words(size: tuple[int, int]) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"
