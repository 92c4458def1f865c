"""Model configurations and released variants, shared by the twins."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import fields as dataclass_fields
from typing import Any, Literal, TypedDict

from outlook_common.geometry import IntOrPair, to_pair, window_grid
from outlook_common.text import closest

__all__ = [
    "VOLO_VARIANTS",
    "FeatureInfo",
    "OutlookAttentionConfig",
    "VOLOConfig",
    "VOLOVariant",
    "volo_config",
    "volo_variant",
]


@dataclass(frozen=True, init=False)
class OutlookAttentionConfig:
    """Configuration of an `OutlookAttention` layer; takes the layer's arguments.

    Fields hold resolved values: `kernel_size`, `padding` and `stride` as pairs (rows, columns), `proj_drop` and
    `qk_scale` as the numbers used.

    Raises:
        TypeError: a size is not an int or a pair of ints.
        ValueError: a size is not positive, `dim` is not divisible by `num_heads`, or a rate is outside [0, 1].
    """

    dim: int
    num_heads: int
    kernel_size: tuple[int, int]
    padding: tuple[int, int]
    stride: tuple[int, int]
    qkv_bias: bool
    attn_drop: float
    proj_drop: float
    qk_scale: float

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        kernel_size: IntOrPair = 3,
        padding: IntOrPair = 1,
        stride: IntOrPair = 1,
        qkv_bias: bool = False,
        attn_drop: float = 0.1,
        proj_drop: float | None = None,
        qk_scale: float | None = None,
    ) -> None:
        check_heads(dim, num_heads)
        fields = {
            "dim": dim,
            "num_heads": num_heads,
            "kernel_size": to_pair("kernel_size", kernel_size, minimum=1),
            "padding": to_pair("padding", padding, minimum=0),
            "stride": to_pair("stride", stride, minimum=1),
            "qkv_bias": qkv_bias,
            "attn_drop": check_rate("attn_drop", attn_drop),
            # External-Attention-pytorch gives both dropouts one rate.
            "proj_drop": check_rate("proj_drop", attn_drop if proj_drop is None else proj_drop),
            # `or`, not `is None`: the original VOLO reads a scale of zero as "not given".
            "qk_scale": qk_scale or (dim // num_heads) ** -0.5,
        }
        for name, field in fields.items():
            object.__setattr__(self, name, field)

    @property
    def head_dim(self) -> int:
        """D, the channels per head."""
        return self.dim // self.num_heads

    @property
    def places(self) -> int:
        """K*K, the positions of a window."""
        return self.kernel_size[0] * self.kernel_size[1]

    @property
    def attn_features(self) -> int:
        """The outputs of the `attn` projection, N * K*K * K*K."""
        return self.num_heads * self.places**2


def check_heads(dim: int, num_heads: int) -> None:
    """Raise a ValueError unless `num_heads` equal heads make up `dim` channels."""
    if dim < 1 or num_heads < 1:
        raise ValueError(f"dim and num_heads must be at least 1, got dim={dim}, num_heads={num_heads}")
    if dim % num_heads != 0:
        divisors = [n for n in range(1, dim + 1) if dim % n == 0]
        close = (max(n for n in divisors if n < num_heads), *(n for n in divisors if n > num_heads))[:2]
        raise ValueError(
            f"dim must be divisible by num_heads: {dim} % {num_heads} = {dim % num_heads}; "
            f"{' or '.join(f'num_heads={n}' for n in close)} would divide it"
        )


def check_rate(name: str, rate: float) -> float:
    """Return `rate`; raise a ValueError unless it is in [0, 1]."""
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"{name} must be a rate between 0 and 1, got {rate}")
    return rate


def check_image_size(size: tuple[int, int], stride: int) -> None:
    """Raise a ValueError unless both sides of an image are multiples of `stride` pixels."""
    if size[0] % stride == 0 and size[1] % stride == 0 and min(size) > 0:
        return
    fitting = tuple(max(stride, round(side / stride) * stride) for side in size)
    raise ValueError(
        f"images of {size[0]}x{size[1]} pixels do not fit: both sides must be multiples of {stride} "
        f"(patch_size * pooling_scale); {fitting[0]}x{fitting[1]} would fit"
    )


# The first convolution, by its name in both twins.
FIRST_CONV = "patch_embed.conv.0"
# Strides of the stem's first convolution and of a Downsample, the same in every released model.
STEM_STRIDE = 2
DOWNSAMPLE = 2

POOLINGS = ("", "avg", "token")
PATCH_SIZES = (4, 8, 16)
POST_LAYERS = ("ca",)


@dataclass(frozen=True)
class Part:
    """One entry of VOLO's `network`: a stage of blocks, or the downsampling after `stage`."""

    kind: Literal["outlooker", "transformer", "downsample"]
    stage: int


class FeatureInfo(TypedDict):
    """One intermediate output: channels, reduction in pixels, name of its module; a dictionary as timm's."""

    num_chs: int
    reduction: int
    module: str


@dataclass(frozen=True, init=False)
class VOLOConfig:
    """Configuration of a `VOLO`; arguments are named as in timm, sequences have one entry per stage.

    Fields hold resolved values: `img_size`, `out_kernel`, `out_stride` and `out_padding` as pairs (rows, columns),
    `mlp_ratio` with one entry per stage.

    Args:
        layers: number of blocks of each stage.
        img_size: in pixels, an int or (rows, columns); a multiple of `stride`.
        in_chans: channels of the images.
        num_classes: 0 for a model without classifier.
        global_pool: input of the classifier: "token" the class token, "avg" the mean of all tokens, "" every token.
        patch_size: in pixels: 4, 8 or 16.
        stem_hidden_dim: channels of the stem's convolutions.
        embed_dims: C of each stage.
        num_heads: N of each stage.
        downsamples: whether a stage is followed by a 2x2 downsampling.
        outlook_attention: whether a stage has outlookers, else transformer blocks.
        mlp_ratio: hidden / outer channels of the MLPs, one number or one per stage.
        qkv_bias: whether the query, key and value projections have a bias.
        drop_rate: dropout rate before the classifiers.
        pos_drop_rate: dropout rate after `pos_embed` is added.
        attn_drop_rate: dropout rate of all attention weights.
        drop_path_rate: stochastic depth of the last transformer block; earlier blocks' rates grow to it linearly.
        post_layers: one "ca" per class attention block; None for a model without class token.
        use_aux_head: whether a second head classifies every token (token labelling).
        use_mix_token: whether `forward_train` mixes tokens of two images (MixToken).
        pooling_scale: patch map size / token map size.
        out_kernel: K of the outlookers.
        out_stride: S of the outlookers.
        out_padding: P of the outlookers.
        dynamic_img_size: whether images of other sizes are accepted, with `pos_embed` resized at each call.

    Raises:
        TypeError: a size is not an int or a pair of ints.
        ValueError: a value is out of range, or values contradict each other.
    """

    layers: tuple[int, ...]
    img_size: tuple[int, int]
    in_chans: int
    num_classes: int
    global_pool: str
    patch_size: int
    stem_hidden_dim: int
    embed_dims: tuple[int, ...]
    num_heads: tuple[int, ...]
    downsamples: tuple[bool, ...]
    outlook_attention: tuple[bool, ...]
    mlp_ratio: tuple[float, ...]
    qkv_bias: bool
    drop_rate: float
    pos_drop_rate: float
    attn_drop_rate: float
    drop_path_rate: float
    post_layers: tuple[str, ...] | None
    use_aux_head: bool
    use_mix_token: bool
    pooling_scale: int
    out_kernel: tuple[int, int]
    out_stride: tuple[int, int]
    out_padding: tuple[int, int]
    dynamic_img_size: bool

    def __init__(
        self,
        layers: Sequence[int],
        img_size: IntOrPair = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        patch_size: int = 8,
        stem_hidden_dim: int = 64,
        *,
        embed_dims: Sequence[int],
        num_heads: Sequence[int],
        downsamples: Sequence[bool] = (True, False, False, False),
        outlook_attention: Sequence[bool] = (True, False, False, False),
        mlp_ratio: float | Sequence[float] = 3.0,
        qkv_bias: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        post_layers: Sequence[str] | None = ("ca", "ca"),
        use_aux_head: bool = True,
        use_mix_token: bool = False,
        pooling_scale: int = 2,
        out_kernel: IntOrPair = 3,
        out_stride: IntOrPair = 2,
        out_padding: IntOrPair = 1,
        dynamic_img_size: bool = False,
    ) -> None:
        ratios = (mlp_ratio,) * len(layers) if isinstance(mlp_ratio, int | float) else tuple(mlp_ratio)
        fields = {
            "layers": tuple(layers),
            "img_size": to_pair("img_size", img_size, minimum=1),
            "in_chans": in_chans,
            "num_classes": num_classes,
            "global_pool": global_pool,
            "patch_size": patch_size,
            "stem_hidden_dim": stem_hidden_dim,
            "embed_dims": tuple(embed_dims),
            "num_heads": tuple(num_heads),
            "downsamples": tuple(downsamples),
            "outlook_attention": tuple(outlook_attention),
            "mlp_ratio": ratios,
            "qkv_bias": qkv_bias,
            "drop_rate": check_rate("drop_rate", drop_rate),
            "pos_drop_rate": check_rate("pos_drop_rate", pos_drop_rate),
            "attn_drop_rate": check_rate("attn_drop_rate", attn_drop_rate),
            "drop_path_rate": check_rate("drop_path_rate", drop_path_rate),
            "post_layers": None if post_layers is None else tuple(post_layers),
            "use_aux_head": use_aux_head,
            "use_mix_token": use_mix_token,
            "pooling_scale": pooling_scale,
            "out_kernel": to_pair("out_kernel", out_kernel, minimum=1),
            "out_stride": to_pair("out_stride", out_stride, minimum=1),
            "out_padding": to_pair("out_padding", out_padding, minimum=0),
            "dynamic_img_size": dynamic_img_size,
        }
        for name, field in fields.items():
            object.__setattr__(self, name, field)
        self._check_choices()
        self._check_stages()
        self._check_heads()
        self._check_sizes()

    @property
    def network(self) -> tuple[Part, ...]:
        """The entries of the model's `network`, in order: stages and the downsamplings after them."""
        parts = []
        for stage, (outlook, downsample) in enumerate(zip(self.outlook_attention, self.downsamples, strict=True)):
            parts.append(Part("outlooker" if outlook else "transformer", stage))
            if downsample:
                parts.append(Part("downsample", stage))
        return tuple(parts)

    @property
    def num_features(self) -> int:
        """Channels of the classifier's input."""
        return self.embed_dims[-1]

    @property
    def stride(self) -> int:
        """Pixels of the image per token, along each axis."""
        return self.patch_size * self.pooling_scale

    @property
    def token_map(self) -> tuple[int, int]:
        """(H, W) of the token map of an image of `img_size`, and of `pos_embed`."""
        return self.img_size[0] // self.stride, self.img_size[1] // self.stride

    def drop_path_rates(self, stage: int) -> tuple[float, ...]:
        """Return the stochastic depth rates of a stage's blocks; 0 for outlookers, as in the original."""
        if self.outlook_attention[stage]:
            return (0.0,) * self.layers[stage]
        before, last = sum(self.layers[:stage]), max(sum(self.layers) - 1, 1)
        return tuple(self.drop_path_rate * (before + block) / last for block in range(self.layers[stage]))

    @property
    def feature_info(self) -> tuple[FeatureInfo, ...]:
        """The outputs of `forward_intermediates`, by stage."""
        reduction, features = self.patch_size, []
        for index, part in enumerate(self.network):
            if part.kind == "downsample":
                reduction *= DOWNSAMPLE
            else:
                channels = self.embed_dims[part.stage]
                features.append(FeatureInfo(num_chs=channels, reduction=reduction, module=f"network.{index}"))
        return tuple(features)

    def _check_choices(self) -> None:
        for name, given, known in (
            ("patch_size", self.patch_size, PATCH_SIZES),
            ("global_pool", self.global_pool, POOLINGS),
            *(("post_layers", layer, POST_LAYERS) for layer in self.post_layers or ()),
        ):
            if given not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {given!r}")
        for name, size, minimum in (
            ("in_chans", self.in_chans, 1),
            ("num_classes", self.num_classes, 0),
            ("stem_hidden_dim", self.stem_hidden_dim, 1),
            ("pooling_scale", self.pooling_scale, 1),
        ):
            if size < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {size}")

    def _check_stages(self) -> None:
        stages = len(self.layers)
        for name in ("embed_dims", "num_heads", "downsamples", "outlook_attention", "mlp_ratio"):
            if len(getattr(self, name)) != stages:
                raise ValueError(f"{name} must have one entry per stage: {stages}, got {len(getattr(self, name))}")
        if not self.layers or min(self.layers) < 1:
            raise ValueError(f"layers must hold at least one block per stage, got {self.layers}")
        if min(self.mlp_ratio) <= 0:
            raise ValueError(f"mlp_ratio must be positive, got {self.mlp_ratio}")
        for dim, heads in zip(self.embed_dims, self.num_heads, strict=True):
            check_heads(dim, heads)
        for stage in range(stages - 1):
            here, following = self.embed_dims[stage : stage + 2]
            if here != following and not self.downsamples[stage]:
                raise ValueError(
                    f"embed_dims change from {here} to {following} behind stage {stage}, which downsamples[{stage}]="
                    "False leaves as it is; only a downsampling changes them"
                )
        if self.downsamples[-1]:
            raise ValueError("downsamples[-1] must be False: no stage follows the last")
        if len(self.network) < 3:
            raise ValueError(
                f"pos_embed is added before network[2], but the network has only {len(self.network)} parts: "
                "three stages, or two with a downsampling between them, would do"
            )
        if self.embed_dims[self.network[2].stage] != self.num_features:
            raise ValueError(
                f"pos_embed has embed_dims[-1]={self.num_features} channels, but network[2], before which it is added, "
                f"has {self.embed_dims[self.network[2].stage]}"
            )
        downsamplings = [index for index, part in enumerate(self.network) if part.kind == "downsample"]
        if downsamplings and max(downsamplings) >= 2:
            raise ValueError(f"pos_embed is added before network[2], but network[{max(downsamplings)}] downsamples")
        if self.pooling_scale != DOWNSAMPLE ** len(downsamplings):
            raise ValueError(
                f"pooling_scale must be {DOWNSAMPLE ** len(downsamplings)} for {len(downsamplings)} downsamplings by "
                f"{DOWNSAMPLE}, got {self.pooling_scale}"
            )

    def _check_heads(self) -> None:
        for name, needs in (("global_pool='token'", self.global_pool == "token"), ("use_aux_head", self.use_aux_head)):
            if needs and self.post_layers is None:
                raise ValueError(f"{name} needs the class token, which post_layers=None leaves out")
        if self.use_mix_token and not (self.use_aux_head and self.global_pool == "token"):
            raise ValueError(
                "use_mix_token needs use_aux_head=True and global_pool='token', "
                f"got use_aux_head={self.use_aux_head} and global_pool={self.global_pool!r}"
            )

    def _check_sizes(self) -> None:
        check_image_size(self.img_size, self.stride)
        size = self.img_size[0] // self.patch_size, self.img_size[1] // self.patch_size
        for part in self.network:
            if part.kind == "outlooker":
                window_grid(size, self.out_kernel, self.out_stride, self.out_padding)
            elif part.kind == "downsample":
                size = size[0] // DOWNSAMPLE, size[1] // DOWNSAMPLE


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class VOLOVariant:
    """A released model: configuration, preparation of images, location of weights.

    `crop_pct` is the fraction of the resized image that is kept; `top1` the published accuracy on ImageNet-1k;
    `mean` and `std` are per channel, of images in 0…1.
    """

    config: VOLOConfig
    crop_pct: float
    top1: float
    hub_id: str
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: str = "bicubic"
    license: str = "apache-2.0"

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, rows, columns) of an image."""
        return self.config.in_chans, *self.config.img_size


_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "d1": {"layers": (4, 4, 8, 2), "embed_dims": (192, 384, 384, 384), "num_heads": (6, 12, 12, 12)},
    "d2": {"layers": (6, 4, 10, 4), "embed_dims": (256, 512, 512, 512), "num_heads": (8, 16, 16, 16)},
    "d3": {"layers": (8, 8, 16, 4), "embed_dims": (256, 512, 512, 512), "num_heads": (8, 16, 16, 16)},
    "d4": {"layers": (8, 8, 16, 4), "embed_dims": (384, 768, 768, 768), "num_heads": (12, 16, 16, 16)},
    "d5": {
        "layers": (12, 12, 20, 4),
        "embed_dims": (384, 768, 768, 768),
        "num_heads": (12, 16, 16, 16),
        "mlp_ratio": 4,
        "stem_hidden_dim": 128,
    },
}

# (architecture, image size in pixels, crop_pct, top-1 accuracy in percent), as released.
_RELEASED = (
    ("d1", 224, 0.96, 84.2),
    ("d1", 384, 1.0, 85.2),
    ("d2", 224, 0.96, 85.2),
    ("d2", 384, 1.0, 86.0),
    ("d3", 224, 0.96, 85.4),
    ("d3", 448, 1.0, 86.3),
    ("d4", 224, 0.96, 85.7),
    ("d4", 448, 1.15, 86.8),
    ("d5", 224, 0.96, 86.1),
    ("d5", 448, 1.15, 87.0),
    ("d5", 512, 1.15, 87.1),
)

VOLO_VARIANTS: dict[str, VOLOVariant] = {
    f"volo_{name}_{size}": VOLOVariant(
        config=VOLOConfig(img_size=size, **_ARCHITECTURES[name]),
        crop_pct=crop_pct,
        top1=top1,
        hub_id=f"timm/volo_{name}_{size}.sail_in1k",
    )
    for name, size, crop_pct, top1 in _RELEASED
}


def volo_variant(name: str) -> VOLOVariant:
    """Return a released variant by name; raise a ValueError with the closest name if it is unknown."""
    if name not in VOLO_VARIANTS:
        close = closest(name, VOLO_VARIANTS, cutoff=0.0)
        raise ValueError(
            f"unknown variant {name!r}; did you mean {close!r}? Known: {', '.join(map(repr, VOLO_VARIANTS))}"
        )
    return VOLO_VARIANTS[name]


# Arguments of timm's `create_model` that are no fields of a configuration -> what to use instead.
_ELSEWHERE = {
    "pretrained": "from_pretrained(name) makes a model with its released weights",
    "checkpoint_path": "from_pretrained(path) makes a model with the weights of a file",
    "features_only": "forward_intermediates gives the maps of any model, and num_classes=0 leaves out the heads",
}


def nearest_variant(config: VOLOConfig) -> str:
    """Return the released variant from which the fewest fields of a configuration differ; of several the first."""

    def differing(name: str) -> int:
        released = vars(VOLO_VARIANTS[name].config)
        return sum(value != released[field] for field, value in vars(config).items())

    return min(VOLO_VARIANTS, key=differing)


def with_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields of a configuration from JSON, TOML or a command line: their lists are tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def volo_config(name: str, **overrides: Any) -> VOLOConfig:
    """Return the configuration of a released variant with some fields changed.

    Raises:
        TypeError: an override is not a field; the message suggests a field or another function.
        ValueError: the variant is unknown, or the fields contradict each other.
    """
    return changed(volo_variant(name).config, **overrides)


def changed(config: VOLOConfig, **overrides: Any) -> VOLOConfig:
    """Return a configuration with some fields changed; raises what `volo_config` does."""
    known = [field.name for field in dataclass_fields(VOLOConfig)]
    for override in overrides:
        if override not in known:
            close = closest(override, known)
            hint = _ELSEWHERE.get(override) or (f"did you mean {close!r}?" if close else f"known: {', '.join(known)}")
            raise TypeError(f"{override!r} is not a field of VOLOConfig; {hint}")
    return replace(config, **overrides)
