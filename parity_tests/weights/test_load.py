"""Weights of the layer: the table, the namings, the twins' loading and export, and every error."""

import pickle
from collections.abc import Callable
from inspect import unwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.volo import OutlookAttention as TimmOutlookAttention
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

import outlook_jax
import outlook_torch
from outlook_common import OutlookAttentionConfig
from outlook_common.arrays import BFLOAT16, DTYPES, to_numpy, to_tensor
from outlook_common.weights import (
    Entry,
    WeightsError,
    WeightTable,
    convert,
    read_arrays,
    resolve,
    table_for,
    write_arrays,
)
from outlook_common.weights.checkpoint import open_checkpoint
from outlook_common.weights.conversion import renamed
from outlook_common.weights.errors import Kind
from outlook_common.weights.identify import recognise
from outlook_common.weights.match import naming_of
from outlook_common.weights.tables.base import linear_entries
from outlook_common.weights.tables.volo import batch_norm_entries
from outlook_jax.weights import path_name

FLOATS = ("float64", "float32", "float16", "bfloat16")
DIM, HEADS = 6, 2
CONFIG = OutlookAttentionConfig(DIM, HEADS, qkv_bias=True)
TABLE = table_for(CONFIG)
NAMINGS = ("torch", "flax", "external-attention")


def any_bits(shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> np.ndarray:
    """Every bit random, so NaN payloads, infinities, -0.0 and denormals too; the first few are sure to be such."""
    numbers = DTYPES[dtype]
    array = np.frombuffer(rng.bytes(int(np.prod(shape)) * numbers.itemsize), numbers).copy()
    special = np.array([-0.0, np.inf, -np.inf, np.nan], numbers)
    array[:4] = special
    word = np.dtype(f"u{numbers.itemsize}")
    array.view(word)[4:6] = [3, special.view(word)[3] ^ 5]  # a denormal, a NaN with a payload
    return array.reshape(shape)


def layer_weights(dtype: str = "float32", seed: int = 0, table: WeightTable = TABLE) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {entry.torch: rng.standard_normal(entry.shape).astype(DTYPES[dtype]) for entry in table.entries}


def layer_bits(dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {entry.torch: any_bits(entry.shape, dtype, rng) for entry in TABLE.entries}


def torch_layer(dtype: str = "float32", **kwargs: Any) -> outlook_torch.OutlookAttention:
    return outlook_torch.OutlookAttention(DIM, HEADS, qkv_bias=True, dtype=getattr(torch, dtype), **kwargs).eval()


def jax_layer(dtype: str = "float32") -> outlook_jax.OutlookAttention:
    return outlook_jax.OutlookAttention(
        DIM, HEADS, qkv_bias=True, param_dtype=jnp.dtype(dtype), deterministic=True, rngs=nnx.Rngs(0)
    )


TWINS: dict[str, tuple[Any, Callable[..., Any]]] = {
    "torch": (outlook_torch, torch_layer),
    "jax": (outlook_jax, jax_layer),
}
both_twins = pytest.mark.parametrize("twin", TWINS)


def assert_same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


# The table


def test_table_lists_the_torch_twins_state_dict_in_its_order() -> None:
    state = torch_layer().state_dict()
    assert [(entry.torch, entry.shape) for entry in TABLE.entries] == [(k, tuple(v.shape)) for k, v in state.items()]


def test_table_lists_the_jax_twins_paths_and_shapes() -> None:
    state = nnx.to_flat_state(nnx.state(jax_layer(), nnx.Param))
    found = {".".join(map(str, path)): variable.get_value().shape for path, variable in state}
    assert found == {entry.flax: entry.flax_shape for entry in TABLE.entries}


def test_conv_layout_turns_pytorchs_oihw_into_flaxs_hwio_and_back() -> None:
    entry = Entry("stem.weight", "stem.kernel", (2, 3, 4, 5), "conv")
    kernel = np.random.default_rng(0).standard_normal(entry.shape)
    turned = entry.to_flax(kernel)
    assert turned.shape == entry.flax_shape == (4, 5, 3, 2)
    assert turned[3, 2, 1, 0] == kernel[0, 1, 3, 2]
    assert np.array_equal(entry.to_torch(turned), kernel)


def test_layout_needs_its_number_of_axes() -> None:
    with pytest.raises(ValueError, match=r"w: layout 'conv' has 4 axes, its shape is \(2, 3\)"):
        Entry("w", "w", (2, 3), "conv")


@pytest.mark.parametrize(
    ("entries", "aliases", "words"),
    [
        ([("a", "x"), ("a", "y")], {}, "torch"),
        ([("a", "x"), ("b", "x")], {}, "flax"),
        ([("a", "x"), ("b", "y")], {"other": {"b": "a"}}, "other"),
        ([("a", "x"), ("b", "y")], {"other": {"c": "a", "d": "a"}}, "two aliases of other"),
        ([("a", "x")], {"other": {"c": "z"}}, "unknown"),
    ],
)
def test_table_refuses_names_that_are_not_unique(
    entries: list[tuple[str, str]], aliases: dict[str, dict[str, str]], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        WeightTable("model", tuple(Entry(name, path, (1,)) for name, path in entries), aliases)


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(st.from_regex(r"[a-z]{1,4}(\.[0-9])?", fullmatch=True), st.integers(1, 4), st.integers(1, 4)),
        unique_by=lambda entry: entry[0],
        min_size=1,
        max_size=6,
    ),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_any_table_survives_torch_to_flax_to_torch(layers: list[tuple[str, int, int]], bias: bool, seed: int) -> None:
    table = WeightTable("model", sum((linear_entries(*layer, bias=bias) for layer in layers), ()))
    rng = np.random.default_rng(seed)
    weights = {entry.torch: rng.standard_normal(entry.shape) for entry in table.entries}
    flax = renamed(weights, table, "flax")
    assert {name: array.shape for name, array in flax.items()} == {e.flax: e.flax_shape for e in table.entries}
    assert_same_bits(resolve(flax, table), weights)


def test_config_of_no_known_model_is_named() -> None:
    with pytest.raises(TypeError, match="no weight table for dict; known: OutlookAttentionConfig"):
        table_for({})


def test_heads_are_told_from_shapes_only_where_they_must_be() -> None:
    def shapes(dim: int, features: int) -> dict[str, tuple[int, ...]]:
        return {"v.weight": (dim, dim), "attn.bias": (features,), "proj.bias": (dim,)}

    only = recognise(shapes(192, 6 * 81))
    assert only is not None
    assert only.sizes == {"dim": 192, "attn_features": 486, "qkv_bias": False, "num_heads": 6, "window_places": 9}
    # 81 * 81 weights are 81 heads of one place, or one head of 81, or nine heads' worth of 27.
    several = recognise(shapes(81, 81 * 81))
    assert several is not None
    assert several.sizes.keys() == {"dim", "attn_features", "qkv_bias"}


# Namings and wrappers


@pytest.mark.parametrize("naming", NAMINGS)
@both_twins
def test_each_naming_loads_the_same_weights(twin: str, naming: str) -> None:
    package, make = TWINS[twin]
    weights, layer = layer_weights(), make()
    package.load_weights(layer, renamed(weights, TABLE, naming))
    assert_same_bits(package.export_weights(layer), weights)
    assert naming_of(TABLE.names(naming), TABLE) == naming


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        module, leaf = name.split(".")
        tree.setdefault(module, {})[leaf] = value
    return tree


WEIGHTS = layer_weights()
IN_FLAX = renamed(WEIGHTS, TABLE, "flax")
WRAPPED = {
    "state_dict": {"state_dict": WEIGHTS, "epoch": 3, "optimizer": {"state": {}}},
    "model": {"model": WEIGHTS, "args": "anything"},
    "model in state_dict": {"state_dict": {"model": WEIGHTS}},
    "module.": {f"module.{name}": array for name, array in WEIGHTS.items()},
    "state_dict and module.": {"state_dict": {f"module.{name}": array for name, array in WEIGHTS.items()}},
    "module._orig_mod.": {f"module._orig_mod.{name}": array for name, array in WEIGHTS.items()},
    "_orig_mod.module.": {f"_orig_mod.module.{name}": array for name, array in WEIGHTS.items()},
    "model._orig_mod.": {f"model._orig_mod.{name}": array for name, array in WEIGHTS.items()},
    "slashes": {name.replace(".", "/"): array for name, array in IN_FLAX.items()},
    "tuples": {tuple(name.split(".")): array for name, array in IN_FLAX.items()},
    "nested": nested(IN_FLAX),
    "Linen's params": {"params": nested(IN_FLAX)},
    "PyTorch's tensors": {name: to_tensor(array) for name, array in WEIGHTS.items()},
    "trainable parameters": {name: nn.Parameter(to_tensor(array)) for name, array in WEIGHTS.items()},
    "JAX's arrays": {name: jnp.asarray(array) for name, array in IN_FLAX.items()},
    "big-endian": {name: array.astype(">f4") for name, array in WEIGHTS.items()},
    "not contiguous": {name: np.repeat(array, 2, axis=-1)[..., ::2] for name, array in WEIGHTS.items()},
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrapper_is_taken_off(wrapper: str) -> None:
    found = resolve(WRAPPED[wrapper], TABLE)
    for name, array in WEIGHTS.items():
        assert np.array_equal(found[name], array), name


def test_tensors_of_every_float_dtype_are_read_bit_by_bit_in_any_strides() -> None:
    for dtype in FLOATS:
        bits = any_bits((5, 7), dtype, np.random.default_rng(1))
        assert to_numpy(to_tensor(bits)).tobytes() == bits.tobytes()
        assert to_numpy(to_tensor(bits).T).tobytes() == bits.T.tobytes()
        assert to_numpy(jnp.asarray(bits)).tobytes() == bits.tobytes()


@pytest.mark.parametrize("above", ["", "state."])
def test_linens_statistics_are_found_beside_the_parameters_also_in_a_train_state(above: str) -> None:
    table = WeightTable("a norm", batch_norm_entries("bn", 3))
    names = {"params": ("scale", "bias"), "batch_stats": ("mean", "var", "num_batches_tracked")}
    given = {f"{above}{part}.bn.{leaf}": np.float32(place) for part in names for place, leaf in enumerate(names[part])}
    arrays = {name: np.int64(4) if "tracked" in name else np.full(3, value) for name, value in given.items()}
    beside = {f"{above}opt_state.0.mu.bn.scale": np.ones(3, "f4"), f"{above}step": np.int64(7)}
    found = resolve(arrays | beside, table, prefix=f"{above}params")
    assert {name: array.max() for name, array in found.items()} == {
        "bn.weight": 0,
        "bn.bias": 1,
        "bn.running_mean": 0,
        "bn.running_var": 1,
        "bn.num_batches_tracked": 4,
    }
    with pytest.raises(WeightsError, match=f"a complete one is found with prefix='{above}params'"):
        resolve(arrays | beside, table)


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema"])
@both_twins
def test_ema_weights_are_taken_when_asked_and_only_then(twin: str, key: str) -> None:
    package, make = TWINS[twin]
    averaged, layer = layer_weights(seed=1), make()
    source = {"state_dict": WEIGHTS, key: {f"module.{k}": v for k, v in averaged.items()}}
    package.load_weights(layer, source)
    assert_same_bits(package.export_weights(layer), WEIGHTS)
    package.load_weights(layer, source, use_ema=True)
    assert_same_bits(package.export_weights(layer), averaged)


def test_ema_weights_that_are_not_there_are_an_error() -> None:
    with pytest.raises(WeightsError, match="no 'state_dict_ema' or 'model_ema'; at the top it has state_dict, epoch"):
        resolve({"state_dict": WEIGHTS, "epoch": 1}, TABLE, use_ema=True)


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema"])
def test_ema_weights_alone_are_not_taken_unasked(key: str) -> None:
    with pytest.raises(WeightsError, match=f"only averaged weights, '{key}'"):
        resolve({key: WEIGHTS, "epoch": 1}, TABLE)


def inside_a_model(naming: str) -> dict[str, Any]:
    """Two layers, with different weights, and other tensors that no table knows."""
    source: dict[str, Any] = {"patch_embed.proj.weight": np.ones((2, 3, 4, 4)), "network.0.0.norm1.weight": np.ones(6)}
    for place in (0, 1):
        weights = renamed(layer_weights(seed=place), TABLE, naming)
        source |= {f"network.0.{place}.attn.{name}": array for name, array in weights.items()}
    return source


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("prefix", ["network.0.1.attn", "network/0/1/attn", "network.0.1.attn."])
def test_prefix_chooses_one_layer_of_a_model(naming: str, prefix: str) -> None:
    found = resolve({"state_dict": inside_a_model(naming)}, TABLE, prefix=prefix)
    for name, array in layer_weights(seed=1).items():
        assert np.array_equal(found[name], array)


def test_prefix_with_nothing_below_lists_where_a_layer_is() -> None:
    for prefix in ("network.0.2.attn", ""):
        with pytest.raises(WeightsError, match=r"prefix='network\.0\.0\.attn', 'network\.0\.1\.attn'"):
            resolve(inside_a_model("torch"), TABLE, prefix=prefix)


# The twins


@pytest.mark.parametrize("dtype", FLOATS)
@both_twins
def test_load_and_export_keep_every_bit(twin: str, dtype: str) -> None:
    package, make = TWINS[twin]
    bits, layer = layer_bits(dtype), make(dtype)
    package.load_weights(layer, bits)
    assert_same_bits(package.export_weights(layer), bits)


@both_twins
def test_models_changed_by_hand_are_refused_and_left_as_they_are(twin: str) -> None:
    package, make = TWINS[twin]
    layer = make()
    layer.proj = torch.nn.Linear(DIM, 5) if twin == "torch" else nnx.Linear(DIM, 5, rngs=nnx.Rngs(0))
    layer.gain = torch.nn.Parameter(torch.ones(3)) if twin == "torch" else nnx.Param(jnp.ones(3))
    before = layer.v.weight.detach().clone() if twin == "torch" else layer.v.kernel[...]
    # Names of the first few, those of another shape first.
    match = (
        rf"other weights than its configuration says \(proj\.\w+ is .*5.*, not .*; proj\.bias is \(5,\), not \({DIM},\)"
    )
    for call in (lambda: package.load_weights(layer, layer_weights()), lambda: package.export_weights(layer)):
        with pytest.raises(TypeError, match=match + "; gain is there besides"):
            call()
    assert (before == (layer.v.weight if twin == "torch" else layer.v.kernel[...])).all()


def test_a_compiled_model_is_no_model_of_this_package() -> None:
    with pytest.raises(TypeError, match=r"weight is not there; .*: give it as it was made, not compiled"):
        outlook_torch.export_weights(torch.compile(torch_layer(), backend="eager"))


def test_a_torch_layer_on_the_meta_device_gets_weights_on_the_cpu() -> None:
    weights = layer_bits("float32")
    with torch.device("meta"):
        layer = torch_layer()
    outlook_torch.load_weights(layer, weights)
    assert all(isinstance(weight, nn.Parameter) and weight.requires_grad for weight in layer.parameters())
    assert_same_bits(outlook_torch.export_weights(layer), weights)


@pytest.mark.parametrize("to", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_both_twins_cast_to_the_parameters_dtype_as_load_state_dict_does(dtype: str, to: str) -> None:
    weights = layer_weights(dtype)
    # Lies just above the middle between two numbers in 16 bits, and in float32 on it.
    bits = 10 if to == "float16" else 7
    weights["v.weight"][:, 0] = np.array(1 + 2.0 ** -(bits + 1) + 2.0**-40).astype(DTYPES[dtype])
    reference, ours, theirs = torch_layer(to), torch_layer(to), jax_layer(to)
    reference.load_state_dict({name: to_tensor(array) for name, array in weights.items()})
    outlook_torch.load_weights(ours, weights)
    outlook_jax.load_weights(theirs, weights)
    expected = outlook_torch.export_weights(reference)
    assert {array.dtype for array in expected.values()} == {DTYPES[to]}
    assert_same_bits(outlook_torch.export_weights(ours), expected)
    assert_same_bits(outlook_jax.export_weights(theirs), expected)


@both_twins
def test_number_too_large_for_the_parameters_dtype_is_warned_of(twin: str) -> None:
    package, make = TWINS[twin]
    with pytest.warns(RuntimeWarning, match="overflow"):
        package.load_weights(make("float16"), layer_weights("float64") | {"v.bias": np.full(DIM, 1e6)})


@both_twins
def test_exported_weights_are_copies(twin: str) -> None:
    package, make = TWINS[twin]
    layer = make()
    package.load_weights(layer, WEIGHTS)
    for array in package.export_weights(layer).values():
        array[...] = -1
    assert_same_bits(package.export_weights(layer), WEIGHTS)


@both_twins
def test_loaded_weights_do_not_alias_the_source(twin: str) -> None:
    package, make = TWINS[twin]
    source, layer = layer_weights(), make()
    package.load_weights(layer, source)
    for array in source.values():
        array[...] = -1
    assert_same_bits(package.export_weights(layer), WEIGHTS)


@both_twins
def test_nothing_is_loaded_on_error(twin: str) -> None:
    package, make = TWINS[twin]
    layer = make()
    package.load_weights(layer, WEIGHTS)
    with pytest.raises(WeightsError):
        package.load_weights(layer, layer_weights(seed=1) | {"proj.bias": np.ones(DIM + 1)})
    assert_same_bits(package.export_weights(layer), WEIGHTS)


def test_jax_twin_loads_what_nnx_gives_as_its_state() -> None:
    source, layer = jax_layer(), jax_layer()
    outlook_jax.load_weights(source, WEIGHTS)
    state = nnx.state(source, nnx.Param)
    for given_state in (state, nnx.to_pure_dict(state), dict(nnx.to_flat_state(state))):
        outlook_jax.load_weights(layer, layer_weights(seed=1))
        outlook_jax.load_weights(layer, given_state)
        assert_same_bits(outlook_jax.export_weights(layer), WEIGHTS)


def test_jax_twin_loads_into_a_layer_without_arrays() -> None:
    layer = nnx.eval_shape(jax_layer)
    outlook_jax.load_weights(layer, WEIGHTS)
    assert_same_bits(outlook_jax.export_weights(layer), WEIGHTS)
    assert isinstance(layer.v.kernel.get_value(), jax.Array)


@both_twins
def test_model_of_another_package_is_named(twin: str) -> None:
    package, _ = TWINS[twin]
    stranger = nn.Linear(2, 2) if twin == "torch" else nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="no weight table for Linear"):
        package.load_weights(stranger, WEIGHTS)


def test_timms_model_is_named_with_what_it_takes() -> None:
    with pytest.raises(TypeError, match="OutlookAttention, a class of timm's: its own load_state_dict"):
        outlook_torch.load_weights(TimmOutlookAttention(DIM, HEADS), WEIGHTS)


def test_a_model_as_source_says_what_to_give_instead() -> None:
    for source, instead in ((torch_layer(), r"model\.state_dict\(\)"), (jax_layer(), r"nnx\.state\(model\)")):
        with pytest.raises(TypeError, match=f"OutlookAttention is no source of weights: of a model give {instead}"):
            unwrap(open_checkpoint)(source)  # without the tests' own checks of types
    with pytest.raises(TypeError, match="list is no source of weights: give a path"):
        unwrap(open_checkpoint)([1])


def test_export_of_a_model_in_parts_says_how_to_gather_it(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        layer = torch_layer()
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(TypeError, match=r"a DTensor, of which this process has a part: .* get_model_state_dict"):
            outlook_torch.export_weights(layer)
        whole = get_model_state_dict(layer, options=StateDictOptions(full_state_dict=True))
        outlook_torch.load_weights(torch_layer(), whole)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("given", ["state", "flat", "npz"])
def test_a_whole_state_of_nnx_loads_without_its_random_streams(tmp_path: Path, given: str) -> None:
    layer = outlook_jax.OutlookAttention(DIM, HEADS, qkv_bias=True, attn_drop=0.1, proj_drop=0.1, rngs=nnx.Rngs(0))
    outlook_jax.load_weights(layer, WEIGHTS)
    flat = {path_name(path): variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(layer))}
    flat = {name: jax.random.key_data(array) if name.endswith(".key") else array for name, array in flat.items()}
    source: Any = {"state": nnx.state(layer), "flat": flat, "npz": tmp_path / "a.npz"}[given]
    write_arrays(tmp_path / "a.npz", flat)
    streams = {f"{drop}.rngs.{name}" for drop in ("attn_drop", "proj_drop") for name in ("count", "key")}
    found = convert(source, tmp_path / "b.npz", to="torch")
    assert (set(found.not_weights), found.ignored, found.tensors) == (streams, (), len(WEIGHTS))
    assert_same_bits(read_arrays(tmp_path / "b.npz"), WEIGHTS)
    outlook_torch.load_weights(torch_layer(), source)
    with pytest.raises(WeightsError, match=r"unexpected \(1\):\n +rngs\.state"):
        convert({**WEIGHTS, "rngs.state": np.zeros(2)}, tmp_path / "b.npz")


class ExternalOutlookAttention(nn.Module):
    """The layer with the parameter names of External-Attention-pytorch, at its defaults of stride and padding."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.v_pj = nn.Linear(dim, dim)
        self.attn = nn.Linear(dim, 81 * num_heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, H, W, C = x.shape
        N, D = self.num_heads, C // self.num_heads
        windows = functional.unfold(self.v_pj(x).movedim(-1, 1), 3, padding=1).reshape(B, N, D, 9, H * W)
        logits = self.attn(x).reshape(B, H * W, N, 9, 9) * D**-0.5
        mixed = torch.einsum("blnpq,bndql->bndpl", logits.softmax(-1), windows)
        out = functional.fold(mixed.reshape(B, C * 9, H * W), (H, W), 3, padding=1)
        return self.proj(out.movedim(1, -1))


OTHERS = {
    "timm": lambda: TimmOutlookAttention(DIM, HEADS, qkv_bias=True),
    "External-Attention-pytorch": lambda: ExternalOutlookAttention(DIM, HEADS),
}


@pytest.mark.parametrize("other", OTHERS)
def test_layers_of_others_compute_the_same_once_loaded_into_either_twin(other: str) -> None:
    torch.manual_seed(0)
    theirs = OTHERS[other]().double().eval()
    x = torch.randn(2, 5, 7, DIM, dtype=torch.float64)
    expected = theirs(x).detach().numpy()
    ours, twin = torch_layer("float64"), jax_layer("float64")
    outlook_torch.load_weights(ours, theirs.state_dict())
    outlook_jax.load_weights(twin, theirs.state_dict())
    for found in (ours(x).detach().numpy(), np.asarray(twin(jnp.asarray(x.numpy())))):
        assert np.abs(found - expected).max() <= 1e-12 * np.abs(expected).max()


# Errors


def change(**changes: Any) -> dict[str, Any]:
    """WEIGHTS with some changed; None leaves one out, and "__" stands for a dot."""
    source = WEIGHTS | {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in source.items() if value is not None}


BROKEN: dict[str, tuple[dict[str, Any], Kind, list[str], str]] = {
    "missing": (change(v__weight=None), "missing", ["v.weight"], r"v.weight \(6, 6\)"),
    "unexpected": (change(v__scale=np.ones(6)), "unexpected", ["v.scale"], "v.scale"),
    "misshapen": (
        change(attn__weight=np.ones((6, 162))),
        "misshapen",
        ["attn.weight"],
        r"attn.weight: \(6, 162\), expected \(162, 6\)",
    ),
    "misshapen in Flax": (
        IN_FLAX | {"attn.kernel": np.ones((162, 6))},
        "misshapen",
        ["attn.kernel"],
        r"attn.kernel: \(162, 6\), expected \(6, 162\)",
    ),
    "duplicate": (
        change(v_pj__weight=np.ones((6, 6))),
        "duplicate",
        ["v_pj.weight"],
        "v_pj.weight is v.weight, and so is v.weight",
    ),
    "duplicate by separator": (IN_FLAX | {"v/bias": np.ones(6)}, "duplicate", ["v.bias"], "and so is v.bias"),
    "mixed naming": (
        change(v__weight=None, v__kernel=np.ones((6, 6))),
        "mixed naming",
        ["v.kernel"],
        "the other names are torch's, where it is v.weight",
    ),
    "object": (change(v__bias=object()), "non-numeric", ["v.bias"], "v.bias: object"),
    "string": (change(v__bias="ones"), "non-numeric", ["v.bias"], "v.bias: str"),
    "None": ({**WEIGHTS, "v.bias": None}, "non-numeric", ["v.bias"], "v.bias: NoneType"),
    "ragged": (change(v__bias=[[1.0], [1.0, 2.0]]), "non-numeric", ["v.bias"], "v.bias: list is no array"),
    "complex": (change(v__bias=np.ones(6, "c8")), "non-numeric", ["v.bias"], "v.bias: an array of complex64"),
    "integers": (change(v__bias=np.ones(6, "i8")), "non-numeric", ["v.bias"], "int64, expected floating-point"),
    "float8": (change(v__bias=torch.ones(6).to(torch.float8_e4m3fn)), "non-numeric", ["v.bias"], "float8_e4m3fn"),
    "sparse": (
        change(v__bias=torch.ones(6).to_sparse()),
        "non-numeric",
        ["v.bias"],
        "v.bias: a tensor of torch.float32",
    ),
    "meta": (change(v__bias=torch.ones(6, device="meta")), "non-numeric", ["v.bias"], "v.bias: .*meta"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_error_names_the_one_tensor_that_is_wrong(case: str) -> None:
    source, kind, names, words = BROKEN[case]
    with pytest.raises(WeightsError, match=words) as caught:
        resolve(source, TABLE)
    assert [problem.kind for problem in caught.value.problems] == [kind]
    assert caught.value.names(kind) == names


def test_all_problems_are_reported_at_once_with_counts_and_nearest_names() -> None:
    source = {
        "v.wieght": np.ones((6, 6)),
        "v.bias": "none",
        "attn.weight": np.ones((6, 162)),
        "attn.bias": np.ones(162),
        "v_pj.bias": np.ones(6),
        "proj.kernel": np.ones((6, 6)),
    }
    with pytest.raises(WeightsError) as caught:
        resolve(source, TABLE)
    error = caught.value
    found = {problem.kind: error.names(problem.kind) for problem in error.problems}
    assert found == {
        "duplicate": ["v_pj.bias"],
        "misshapen": ["attn.weight"],
        "missing": ["v.weight", "proj.bias"],
        "mixed naming": ["proj.kernel"],
        "non-numeric": ["v.bias"],
        "unexpected": ["v.wieght"],
    }
    message = str(error)
    assert "7 problems with its 6 tensors" in message
    assert "missing (2):" in message
    assert "v.weight (6, 6); the nearest there is v.wieght" in message
    assert "v.wieght; the nearest known is v.weight" in message


def test_error_survives_pickling_as_it_must_to_leave_a_worker_process() -> None:
    with pytest.raises(WeightsError) as caught:
        resolve(change(v__weight=None), TABLE)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert again.problems == caught.value.problems


def test_long_error_shows_the_first_problems_and_counts_the_rest() -> None:
    with pytest.raises(WeightsError, match=r"unexpected \(500\):(?s:.*)and 480 more") as caught:
        resolve(WEIGHTS | {f"blocks.{place}.weight": np.ones(1) for place in range(500)}, TABLE)
    assert len(caught.value.problems) == 500
    assert len(str(caught.value).splitlines()) == 23


def test_both_twins_say_the_same() -> None:
    messages = []
    for package, make in TWINS.values():
        with pytest.raises(WeightsError) as caught:
            package.load_weights(make(), change(v__weight=None, proj__bias=np.ones(5)))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


COUNTED = WeightTable("counted", (Entry("count", "count", (), dtype="int64"),))


def test_counter_keeps_its_own_dtype_and_takes_no_fractions() -> None:
    found = resolve({"count": jnp.asarray(7, jnp.int32)}, COUNTED)
    assert found["count"].dtype == np.int64
    assert found["count"] == 7
    for wrong in (np.float32(7.0), np.asarray(7.0, BFLOAT16), np.asarray(True)):
        with pytest.raises(WeightsError, match="expected integers"):
            resolve({"count": wrong}, COUNTED)
