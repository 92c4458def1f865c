"""The models whose weights are known: their tables, and how to recognise them in a file."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from outlook_common.config import OutlookAttentionConfig, VOLOConfig, volo_variant
from outlook_common.text import listed
from outlook_common.weights.tables.base import WeightTable, linear_entries
from outlook_common.weights.tables.volo import as_in_file, recognise_volo, volo_table

Shapes = Mapping[str, tuple[int, ...]]

EXTERNAL_ATTENTION = "external-attention"
LAYER = "layer"


@dataclass(frozen=True)
class Recognised:
    """A model found in a file: its table, the sizes that can be read off its tensors, and its configuration.

    `config` is what JSON can hold; of a layer it is the sizes, since its tensors do not show its window.
    """

    table: WeightTable
    sizes: dict[str, int | bool]
    config: dict[str, Any]


@dataclass(frozen=True)
class KnownModel:
    """What to do with one type of model.

    `recognise` gets the shapes of a file by name, in any naming, and returns None unless they are of this model.
    """

    config: type
    table: Callable[[Any], WeightTable]
    recognise: Callable[[Shapes], Recognised | None]


def table_for(config: Any) -> WeightTable:
    """Return the table of the model with this configuration.

    Raises:
        TypeError: no model has such a configuration.
    """
    for model in MODELS:
        if isinstance(config, model.config):
            return model.table(config)
    known = ", ".join(model.config.__name__ for model in MODELS)
    hint = ""
    if hasattr(config, "load_state_dict"):
        package = type(config).__module__.partition(".")[0]
        hint = (
            f", a class of {package}'s: its own load_state_dict takes what export_weights gives of a model of ours, "
            f"as tensors, and accelerate puts our layer into it"
        )
    raise TypeError(f"no weight table for {type(config).__name__}{hint}; known: {known}")


def check_weights_of(found: Shapes, table: WeightTable, naming: str) -> None:
    """Raise a TypeError unless a model has the weights that its configuration says, these alone, in these shapes.

    Args:
        found: the shapes of the model's weights.
        table: of its configuration.
        naming: of `found`.
    """
    expected = {name: entry.shape_in(naming) for name, entry in table.names(naming).items()}
    wrong = [
        f"{name} is {found[name]}, not {shape}" for name, shape in expected.items() if found.get(name, shape) != shape
    ]
    lacking = [f"{name} is not there" for name in expected if name not in found]
    further = [f"{name} is there besides" for name in found if name not in expected]
    if problems := [*wrong, *lacking, *further]:
        raise TypeError(
            f"the model has other weights than its configuration says ({listed(problems, 3, between='; ')}): give it "
            "as it was made, not compiled, wrapped, parametrized or with parts replaced; for other classes there is "
            "`reset_classifier`"
        )


def recognise(shapes: Shapes) -> Recognised | None:
    """Return the first known model that the shapes of a file fit, by name, in any naming."""
    return next((found for model in MODELS if (found := model.recognise(shapes)) is not None), None)


def recognise_as(name: str, shapes: Shapes) -> Recognised | None:
    """Return the model of this name with the sizes that the shapes of a file show; None if they show none of a layer.

    Args:
        name: "layer", or a released variant of VOLO.
        shapes: by name, in any naming.

    Raises:
        ValueError: there is no such model; the message says the nearest name.
    """
    if name == LAYER:
        return _layer_of(shapes)
    return _volo(as_in_file(volo_variant(name).config, shapes))


def layer_table(dim: int, attn_features: int, *, qkv_bias: bool) -> WeightTable:
    """Return the table of an `OutlookAttention`; neither heads nor windows need be known."""
    value_names = ("weight", "bias") if qkv_bias else ("weight",)
    return WeightTable(
        f"OutlookAttention(dim={dim}, attn_features={attn_features}, qkv_bias={qkv_bias})",
        (
            *linear_entries("v", dim, dim, bias=qkv_bias),
            *linear_entries("attn", dim, attn_features),
            *linear_entries("proj", dim, dim),
        ),
        {EXTERNAL_ATTENTION: {f"v_pj.{name}": f"v.{name}" for name in value_names}},
    )


def _table_of_layer(config: OutlookAttentionConfig) -> WeightTable:
    return layer_table(config.dim, config.attn_features, qkv_bias=config.qkv_bias)


# Where a layer's sizes stand, in any naming: (name, axis). More than one, so that a file that lacks one
# tensor is still recognised, and the tensor reported missing.
_DIM = (("proj.bias", 0), ("proj.weight", 0), ("proj.kernel", 1))
_ATTN_FEATURES = (("attn.bias", 0), ("attn.weight", 0), ("attn.kernel", 1))
_VALUE_KERNELS = {"v.weight", "v.kernel", "v_pj.weight"}
_VALUE_BIASES = {"v.bias", "v_pj.bias"}


def _recognise_layer(shapes: Shapes) -> Recognised | None:
    return _layer_of(shapes) if _VALUE_KERNELS & shapes.keys() else None  # others have `attn` and `proj` too


def _layer_of(shapes: Shapes) -> Recognised | None:
    dim, attn_features = _size(shapes, _DIM), _size(shapes, _ATTN_FEATURES)
    if dim is None or attn_features is None:
        return None
    qkv_bias = bool(_VALUE_BIASES & shapes.keys())
    sizes: dict[str, int | bool] = {"dim": dim, "attn_features": attn_features, "qkv_bias": qkv_bias}
    splits = [
        (heads, places)
        for places in range(1, int(attn_features**0.5) + 1)
        for heads in [attn_features // places**2]
        if heads * places**2 == attn_features and dim % heads == 0
    ]
    if len(splits) == 1:
        sizes["num_heads"], sizes["window_places"] = splits[0]
    return Recognised(layer_table(dim, attn_features, qkv_bias=qkv_bias), sizes, {**sizes})


def _size(shapes: Shapes, places: Iterable[tuple[str, int]]) -> int | None:
    return next((shapes[name][axis] for name, axis in places if len(shapes.get(name, ())) > axis), None)


def _recognise_volo(shapes: Shapes) -> Recognised | None:
    config = recognise_volo(shapes)
    return None if config is None else _volo(config)


def _volo(config: VOLOConfig) -> Recognised:
    rows, columns = config.img_size
    sizes: dict[str, int | bool] = {
        "img_rows": rows,
        "img_columns": columns,
        "num_classes": config.num_classes,
        "in_chans": config.in_chans,
    }
    return Recognised(volo_table(config), sizes, asdict(config))


MODELS = (
    KnownModel(OutlookAttentionConfig, _table_of_layer, _recognise_layer),
    KnownModel(VOLOConfig, volo_table, _recognise_volo),
)
