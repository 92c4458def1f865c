"""Identify the known model that a checkpoint holds.

A checkpoint is recognised by the names and shapes of its tensors, in any known naming; no numbers are read.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from typing import Any

from outlook_common.config import FIRST_CONV, VOLO_VARIANTS, OutlookAttentionConfig, VOLOConfig, volo_variant
from outlook_common.text import listed
from outlook_common.weights.checkpoint import Checkpoint, Shape, Shapes
from outlook_common.weights.described import config_in_metadata, config_in_model_config
from outlook_common.weights.errors import WeightsError
from outlook_common.weights.infer import SHOWN, infer_volo
from outlook_common.weights.tables.base import WeightTable
from outlook_common.weights.tables.layer import layer_table, table_of_layer
from outlook_common.weights.tables.volo import volo_table

LAYER = "layer"


@dataclass(frozen=True)
class Recognised:
    """A known model found in a checkpoint.

    Attributes:
        table: of its weights.
        sizes: what its tensors show: channels, classes, image size.
        config: as JSON can hold it; of an unknown architecture what its tensors show: neither the window of a layer nor
            the heads of a VOLO's transformers.
    """

    table: WeightTable
    sizes: dict[str, int | bool]
    config: dict[str, Any]


@dataclass(frozen=True)
class KnownModel:
    """One type of model.

    Attributes:
        config: the class of its configuration.
        table: configuration -> weight table.
        recognise: shapes of a checkpoint -> model; None unless they are of this type.
        of_config: configuration, shapes of a checkpoint -> model.
    """

    config: type
    table: Callable[[Any], WeightTable]
    recognise: Callable[[Shapes], Recognised | None]
    of_config: Callable[[Any, Shapes], Recognised]


def table_for(config: Any) -> WeightTable:
    """Return the weight table of the model with this configuration.

    Raises:
        TypeError: no known model has such a configuration.
    """
    for model in MODELS:
        if isinstance(config, model.config):
            return model.table(config)
    known = ", ".join(model.config.__name__ for model in MODELS)
    hint = ""
    if hasattr(config, "load_state_dict"):
        package = type(config).__module__.partition(".")[0]
        hint = (
            f", a class of {package}: pass what export_weights returns, as tensors, to its own load_state_dict; "
            "accelerate replaces its layers by this package's"
        )
    raise TypeError(f"no weight table for {type(config).__name__}{hint}; known: {known}")


def check_weights_of(found: Shapes, table: WeightTable, naming: str) -> None:
    """Check that a model has exactly the weights of its configuration, in their shapes.

    Args:
        found: the shapes of the model's weights.
        table: of its configuration.
        naming: of `found`.

    Raises:
        TypeError: a weight is missing, unexpected or misshapen.
    """
    expected = {name: entry.shape_in(naming) for name, entry in table.names(naming).items()}
    misshapen = [
        f"{name} is {found[name]}, not {shape}" for name, shape in expected.items() if found.get(name, shape) != shape
    ]
    missing = [f"{name} is missing" for name in expected if name not in found]
    unexpected = [f"{name} is unexpected" for name in found if name not in expected]
    if problems := [*misshapen, *missing, *unexpected]:
        raise TypeError(
            f"the model's weights are not those of its configuration ({listed(problems, 3, between='; ')}): pass it "
            "as it was made, not compiled, wrapped, parametrized or with parts replaced; to change the number of "
            "classes use `reset_classifier`"
        )


# Checkpoints.


def identify(checkpoint: Checkpoint, model: str | None = None) -> Recognised:
    """Return the known model of a checkpoint, or the one called `model`.

    Args:
        checkpoint: to look at.
        model: "layer" or the name of a VOLO variant; None to recognise it.

    Raises:
        WeightsError: it is of no known model; the message lists prefixes that have one.
        ValueError: `model` is unknown.
    """
    found = recognise_checkpoint(checkpoint, model)
    if found is None:
        raise WeightsError(_unrecognised(checkpoint, model))
    return found


def recognise_checkpoint(checkpoint: Checkpoint, model: str | None = None) -> Recognised | None:
    """Return what `identify` does; None if the checkpoint is of no known model.

    Raises:
        ValueError: `model` is unknown.
    """
    if model is not None:
        return recognise_as(model, checkpoint.shapes)
    return _recognise_as_described(checkpoint) or recognise(checkpoint.shapes)


def described_config(checkpoint: Checkpoint) -> Any:
    """Return the configuration in `config.json` or the metadata, if most tensors are its model's; else None."""
    shapes = checkpoint.shapes
    configs = [config_in_metadata(model.config, checkpoint.metadata) for model in MODELS]
    with suppress(TypeError, ValueError, ArithmeticError):  # a config.json of another model
        configs.insert(0, config_in_model_config(checkpoint.described))
    found = (config for config in configs if config is not None)
    return next((config for config in found if _count_of(shapes, table_for(config)) > len(shapes) / 2), None)


def _recognise_as_described(checkpoint: Checkpoint) -> Recognised | None:
    config = described_config(checkpoint)
    kinds = (model for model in MODELS if isinstance(config, model.config))
    return next((model.of_config(config, checkpoint.shapes) for model in kinds), None)


def _count_of(shapes: Shapes, table: WeightTable) -> int:
    """Return how many tensors have a name and shape of a model, in the naming in which there are most."""
    return max(
        sum(name in names and names[name].shape_in(naming) == shape for name, shape in shapes.items())
        for naming in table.namings
        for names in [table.names(naming)]
    )


def recognisable_prefixes(checkpoint: Checkpoint) -> list[str]:
    """Return the prefixes below which a checkpoint has a known model."""
    return checkpoint.prefixes_where(lambda shapes: recognise(shapes) is not None)


def nothing_below(checkpoint: Checkpoint) -> str:
    """Return the message for a prefix with nothing below it: where a model is, else which names there are."""
    if prefixes := recognisable_prefixes(checkpoint):
        elsewhere = f"a known model has prefix={', '.join(map(repr, prefixes))}"
    elif (found := recognise_checkpoint(checkpoint.below(""))) is not None:
        elsewhere = f"without a prefix it is {found.table.model}"
    else:
        elsewhere = f"its names are {listed(dict(checkpoint.everything))}"
    return f"{checkpoint.label}: nothing below the prefix {checkpoint.prefix!r}; {elsewhere}"


def _unrecognised(checkpoint: Checkpoint, model: str | None) -> str:
    if checkpoint.prefix and not checkpoint.items:
        return nothing_below(checkpoint)
    if prefixes := recognisable_prefixes(checkpoint):
        loss = _loss(checkpoint, prefixes)
        return f"{checkpoint.where}: no known model; a known one has prefix={', '.join(map(repr, prefixes))}{loss}"
    known = ", ".join(known.config.__name__.removesuffix("Config") for known in MODELS)
    names = sorted(checkpoint.names)
    wanted = "known model" if model is None else model
    hint = ""
    if model is None and recognise_checkpoint(checkpoint, LAYER) is not None:
        hint = f"; it has parts of a layer: with model={LAYER!r} (--model {LAYER}) missing tensors are reported"
    return f"{checkpoint.where}: no {wanted} in its {len(names)} tensors ({listed(names)}); known: {known}{hint}"


def _loss(checkpoint: Checkpoint, prefixes: Iterable[str]) -> str:
    """Return how much of a checkpoint the largest part below one of these prefixes would leave out, if it is most."""
    kept, total = max(len(checkpoint.below(prefix).items) for prefix in prefixes), len(checkpoint.everything)
    if kept > total / 2:
        return ""
    return f" (a part: {kept} of {total} tensors, the other {total - kept} would be left out)"


# Shapes.


def recognise(shapes: Shapes) -> Recognised | None:
    """Return the first known model that has tensors of these names and shapes, in any naming; None if none has."""
    return next((found for model in MODELS if (found := model.recognise(shapes)) is not None), None)


def recognise_as(name: str, shapes: Shapes) -> Recognised | None:
    """Return the model called `name` with the sizes that the shapes show; None if a layer's sizes do not show.

    Args:
        name: "layer", or a released variant of VOLO.
        shapes: by name, in any naming.

    Raises:
        ValueError: the name is unknown; the message suggests the closest one.
    """
    if name == LAYER:
        return _layer_of(shapes)
    return volo_of(as_in_file(volo_variant(name).config, shapes))


# The layer.

# Tensors that show a layer's sizes, in any naming: (name, axis). More than one, so that a checkpoint that lacks one
# tensor is still recognised, and the tensor reported as missing.
_DIM = (("proj.bias", 0), ("proj.weight", 0), ("proj.kernel", 1))
_ATTN_FEATURES = (("attn.bias", 0), ("attn.weight", 0), ("attn.kernel", 1))
_VALUE_KERNELS = {"v.weight", "v.kernel", "v_pj.weight"}
_VALUE_BIASES = {"v.bias", "v_pj.bias"}


def _recognise_layer(shapes: Shapes) -> Recognised | None:
    return _layer_of(shapes) if _VALUE_KERNELS & shapes.keys() else None  # other layers have `attn` and `proj` too


def _layer_of(shapes: Shapes) -> Recognised | None:
    dim, attn_features = _size(shapes, _DIM), _size(shapes, _ATTN_FEATURES)
    if dim is None or attn_features is None:
        return None
    qkv_bias = bool(_VALUE_BIASES & shapes.keys())
    sizes: dict[str, int | bool] = {"dim": dim, "attn_features": attn_features, "qkv_bias": qkv_bias}
    splits = [
        (heads, positions)
        for positions in range(1, int(attn_features**0.5) + 1)
        for heads in [attn_features // positions**2]
        if heads * positions**2 == attn_features and dim % heads == 0
    ]
    if len(splits) == 1:
        sizes["num_heads"], sizes["window_places"] = splits[0]
    return Recognised(layer_table(dim, attn_features, qkv_bias=qkv_bias), sizes, {**sizes})


def _layer_of_config(config: OutlookAttentionConfig, shapes: Shapes) -> Recognised:
    sizes: dict[str, int | bool] = {
        "dim": config.dim,
        "attn_features": config.attn_features,
        "qkv_bias": config.qkv_bias,
        "num_heads": config.num_heads,
        "window_places": config.places,
    }
    return Recognised(table_of_layer(config), sizes, asdict(config))


def _size(shapes: Shapes, candidates: Iterable[tuple[str, int]]) -> int | None:
    return next((shapes[name][axis] for name, axis in candidates if len(shapes.get(name, ())) > axis), None)


# VOLO.


def recognise_volo(shapes: Shapes) -> VOLOConfig | None:
    """Return the configuration of the released architecture that most tensors fit, in any naming.

    Class count, image size and channels are those of the checkpoint. None unless more than half of its tensors fit one
    architecture by name and shape.
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


def as_in_file(config: VOLOConfig, shapes: Shapes) -> VOLOConfig:
    """Return a configuration with the class count, image size and channels of a checkpoint, in any naming."""
    return replace(
        config,
        num_classes=classes_in_file(shapes),
        img_size=_size_in_file(shapes, config),
        in_chans=_channels_in_file(shapes, config),
    )


def classes_in_file(shapes: Shapes) -> int:
    """Return the class count of a VOLO checkpoint, in any naming; 0 without classifier."""
    for name, axes, axis in (("head.bias", 1, 0), ("head.weight", 2, 0), ("head.kernel", 2, 1)):
        if len(shape := shapes.get(name, ())) == axes:
            return shape[axis]
    return 0


def _size_in_file(shapes: Shapes, config: VOLOConfig) -> tuple[int, int]:
    """Return the image size in pixels; that of `config` where `pos_embed` does not show it."""
    shape = shapes.get("pos_embed", ())
    if len(shape) != 4 or min(shape) < 1:
        return config.img_size
    return shape[1] * config.stride, shape[2] * config.stride


def _channels_in_file(shapes: Shapes, config: VOLOConfig) -> int:
    """Return the channels of the images; those of `config` where the first convolution does not show them."""
    for name, axis in ((f"{FIRST_CONV}.weight", 1), (f"{FIRST_CONV}.kernel", 2)):
        shape = shapes.get(name, ())
        if len(shape) == 4 and shape[axis] > 0:
            return shape[axis]
    return config.in_chans


@lru_cache
def _expected_shapes(config: VOLOConfig) -> tuple[Mapping[str, Shape], Mapping[str, Shape]]:
    """Return the shapes by PyTorch's names and by Flax's."""
    entries = volo_table(config).entries
    return {entry.torch: entry.shape for entry in entries}, {entry.flax: entry.flax_shape for entry in entries}


@cache
def _known_names() -> frozenset[str]:
    return frozenset(
        name for variant in VOLO_VARIANTS.values() for names in _expected_shapes(variant.config) for name in names
    )


def _recognise_volo(shapes: Shapes) -> Recognised | None:
    if (config := recognise_volo(shapes)) is not None:
        return volo_of(config)
    config = infer_volo(shapes)
    if config is None or _count_of(shapes, volo_table(config)) <= len(shapes) / 2:
        return None
    found = volo_of(config)
    return replace(found, config={name: found.config[name] for name in SHOWN})


def _volo_of_config(config: VOLOConfig, shapes: Shapes) -> Recognised:
    return volo_of(as_in_file(config, shapes))


def volo_of(config: VOLOConfig) -> Recognised:
    """Return the model with this configuration."""
    rows, columns = config.img_size
    sizes: dict[str, int | bool] = {
        "img_rows": rows,
        "img_columns": columns,
        "num_classes": config.num_classes,
        "in_chans": config.in_chans,
    }
    return Recognised(volo_table(config), sizes, asdict(config))


MODELS = (
    KnownModel(OutlookAttentionConfig, table_of_layer, _recognise_layer, _layer_of_config),
    KnownModel(VOLOConfig, volo_table, _recognise_volo, _volo_of_config),
)
