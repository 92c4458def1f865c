"""Names and layouts of the VOLO of keras_cv_attention_models (kecam), whose weights are Keras `.h5` files.

There transformer blocks are counted through all stages, and queries, keys and values have a kernel each, split into
heads.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from outlook_common.config import VOLO_VARIANTS

Layout = Literal["same", "dense", "conv"]


@dataclass(frozen=True)
class Piece:
    """Where a tensor of PyTorch comes from.

    Attributes:
        torch: its name in PyTorch.
        keras: names in Keras, "layer/weight"; of several, one after the other along PyTorch's first axis.
        layout: "same"; "dense", (in, out) with either split into heads; or "conv", HWIO.
        inputs: of a dense kernel, how many axes are inputs.
    """

    torch: str
    keras: tuple[str, ...]
    layout: Layout = "same"
    inputs: int = 1


_NORM = {"weight": "gamma", "bias": "beta"}
_BATCH_NORM = {**_NORM, "running_mean": "moving_mean", "running_var": "moving_variance"}

# PyTorch's modules ↔ Keras' layers, outside blocks: (module, layer).
_CONVOLUTIONS = (
    ("patch_embed.conv.0", "stem_1_conv"),
    ("patch_embed.conv.3", "stem_2_conv"),
    ("patch_embed.conv.6", "stem_3_conv"),
    ("patch_embed.proj", "stem_patch_conv"),
    ("network.1.proj", "downsample_conv"),
)
BATCH_NORMS = (
    ("patch_embed.conv.1", "stem_1_bn"),
    ("patch_embed.conv.4", "stem_2_bn"),
    ("patch_embed.conv.7", "stem_3_bn"),
)
_HEADS = (("aux_head", "aux_head"), ("head", "token_head"))
# Inside blocks, behind the block's own name.
_OUTLOOK_ATTENTION = (("attn.v", "attn_v"), ("attn.attn", "attn_attn"), ("attn.proj", "attn_out"))
_MLP = (("mlp.fc1", "mlp_dense_1"), ("mlp.fc2", "mlp_dense_2"))
_BLOCK_NORMS = (("norm1", "LN"), ("norm2", "mlp_LN"))
# Kernels of Keras' MultiHeadAttention, by block: PyTorch's fused projections.
_FUSED: dict[str, dict[str, tuple[str, ...]]] = {
    "MHSA_block": {"attn.qkv": ("query", "key", "value")},
    "classfiers": {"attn.q": ("query",), "attn.kv": ("key", "value")},
}


def pieces(names: Collection[str]) -> list[Piece]:
    """Return where each tensor of PyTorch comes from, for a file with these names; what it lacks is there too."""
    outlookers, transformers, classifiers = (
        _count(names, block) for block in ("outlook_block", "MHSA_block", "classfiers")
    )
    found = [Piece("pos_embed", ("positional_embedding",)), Piece("cls_token", ("class_token",))]
    for module, layer in _CONVOLUTIONS:
        found += _kernel(module, layer, "conv")
    for module, layer in BATCH_NORMS:
        found += _named(module, layer, _BATCH_NORM)
    for block in range(outlookers):
        found += _block(f"network.0.{block}", "outlook_block", block)
    places = ((stage, block) for stage, count in enumerate(_stages(outlookers, transformers)) for block in range(count))
    for index, (stage, block) in enumerate(places):
        found += _block(f"network.{stage + 2}.{block}", "MHSA_block", index)
    for block in range(classifiers):
        found += _block(f"post_network.{block}", "classfiers", block)
    found += _named("norm", "pre_out_LN", _NORM)
    for module, layer in _HEADS:
        found += _kernel(module, layer, "dense")
    return found


def _stages(outlookers: int, transformers: int) -> tuple[int, ...]:
    """Return how many transformers each stage has; all in one if no released variant has as many blocks."""
    layers = (variant.config.layers for variant in VOLO_VARIANTS.values())
    fitting = (rest for first, *rest in layers if (first, sum(rest)) == (outlookers, transformers))
    return tuple(next(fitting, [transformers]))


def _count(names: Collection[str], block: str) -> int:
    """Return how many blocks there are, counted from 0."""
    norms = {name.removesuffix("_LN/gamma") for name in names if name.startswith(block) and name.endswith("_LN/gamma")}
    return next(count for count in range(len(norms) + 1) if f"{block}{count}" not in norms)


def _block(module: str, kind: str, index: int) -> Iterator[Piece]:
    layer = f"{kind}{index}_"
    for own, name in _BLOCK_NORMS:
        yield from _named(f"{module}.{own}", layer + name, _NORM)
    if kind in _FUSED:
        attention = f"{layer}attn_mhsa"
        for own, kernels in _FUSED[kind].items():
            keras = tuple(f"{attention}/{kernel}/kernel" for kernel in kernels)
            yield Piece(f"{module}.{own}.weight", keras, "dense")
        yield Piece(f"{module}.attn.proj.weight", (f"{attention}/attention_output/kernel",), "dense", inputs=2)
        yield Piece(f"{module}.attn.proj.bias", (f"{layer}attn_bias",))
    for own, name in (*(() if kind in _FUSED else _OUTLOOK_ATTENTION), *_MLP):
        yield from _kernel(f"{module}.{own}", layer + name, "dense")


def _kernel(module: str, layer: str, layout: Layout) -> Iterator[Piece]:
    yield Piece(f"{module}.weight", (f"{layer}/kernel",), layout)
    yield Piece(f"{module}.bias", (f"{layer}/bias",))


def _named(module: str, layer: str, names: dict[str, str]) -> Iterator[Piece]:
    yield from (Piece(f"{module}.{torch}", (f"{layer}/{keras}",)) for torch, keras in names.items())
