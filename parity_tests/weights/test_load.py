"""Loading weights: namings, wrappers, prefixes and dtypes."""

from inspect import unwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from timm.models.volo import OutlookAttention as TimmOutlookAttention
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional

import outlook_jax
import outlook_torch
from outlook_common.arrays import DTYPES, to_numpy, to_tensor
from outlook_common.weights import (
    WeightsError,
    WeightTable,
    convert,
    read_arrays,
    resolve,
    table_for,
    write_arrays,
)
from outlook_common.weights.checkpoint import _WRAPPING_STEPS, open_checkpoint
from outlook_common.weights.match import naming_of
from outlook_common.weights.tables.volo import batch_norm_entries
from outlook_jax.weights import path_name
from parity_tests.support.volo import draw_images, draw_weights, jit, last, small_config
from parity_tests.weights.layers import (
    DIM,
    FLOATS,
    HEADS,
    IN_FLAX,
    NAMINGS,
    TABLE,
    TWINS,
    WEIGHTS,
    any_bits,
    assert_same_bits,
    both_twins,
    inside_a_model,
    jax_layer,
    layer_bits,
    layer_weights,
    renamed,
    torch_layer,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


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
def test_wrapper_is_removed(wrapper: str) -> None:
    found = resolve(WRAPPED[wrapper], TABLE)
    for name, array in WEIGHTS.items():
        assert np.array_equal(found[name], array), name


def wrap_inside(place: str, wrap: Any) -> Any:
    """Return a function that wraps the module of a model at this place."""

    def change(model: nn.Module) -> nn.Module:
        owner, _, name = place.rpartition(".")
        setattr(model.get_submodule(owner), name, wrap(model.get_submodule(place)))
        return model

    return change


LAYER = "network.0.0.attn"


def in_each_other(model: nn.Module) -> nn.Module:
    blocks = wrap_inside("network.2", lambda part: torch.compile(nn.DataParallel(part)))(model)
    return torch.optim.swa_utils.AveragedModel(wrap_inside("network.0.1.attn", checkpoint_wrapper)(blocks))


MODULE_WRAPPERS: dict[str, Any] = {
    "compiled inside": wrap_inside("network.0", torch.compile),
    "compiled in several places": lambda model: wrap_inside("head", torch.compile)(
        wrap_inside("network.0.1.attn.v", torch.compile)(model)
    ),
    "data parallel inside": wrap_inside("network.0.1", nn.DataParallel),
    "averaged": torch.optim.swa_utils.AveragedModel,
    "averaged, compiled": lambda model: torch.optim.swa_utils.AveragedModel(torch.compile(model)),
    "in each other": in_each_other,
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # imported by compile
@pytest.mark.parametrize("name", MODULE_WRAPPERS)
def test_steps_of_wrapping_modules_are_removed_anywhere(tmp_path: Path, name: str) -> None:
    model = outlook_torch.VOLO(small_config(), dtype=torch.float32)
    expected = outlook_torch.export_weights(model)
    state = MODULE_WRAPPERS[name](model).state_dict()
    assert not state.keys() <= expected.keys()
    torch.save(state, tmp_path / "a.pth")
    for source in (state, tmp_path / "a.pth"):
        assert_same_bits(resolve(source, table_for(model.config)), expected)
        is_averaged = "n_averaged" in state
        assert open_checkpoint(source).not_weights == (("n_averaged",) if is_averaged else ())
    as_saved = next(name.removesuffix(".v.weight") for name in state if name.endswith("attn.v.weight"))
    layer = {name.removeprefix(f"{LAYER}."): array for name, array in expected.items() if name.startswith(f"{LAYER}.")}
    for prefix in (LAYER, as_saved):  # as the model calls it, as the file does
        assert dict(open_checkpoint(state, prefix=prefix).items).keys() == layer.keys()


@pytest.mark.parametrize("step", sorted(_WRAPPING_STEPS))
def test_each_wrapping_step_is_removed_in_front_and_before_the_leaf(step: str) -> None:
    for place in range(2):
        wrapped = {}
        for name, array in WEIGHTS.items():
            steps = name.split(".")
            steps.insert(place, step)
            wrapped[".".join(steps)] = array
        assert_same_bits(resolve(wrapped, TABLE), WEIGHTS)


def test_steps_of_wrappers_stay_where_names_would_become_one() -> None:
    both = WEIGHTS | {f"module.{name}": array + 1 for name, array in WEIGHTS.items()}
    found = resolve(both, TABLE, prefix="module")
    assert all(np.array_equal(found[name], array + 1) for name, array in WEIGHTS.items())
    with pytest.raises(WeightsError, match=r"unexpected \(6\)(?s:.*)module\.attn\.bias"):
        resolve(both, TABLE)


@pytest.mark.parametrize("start", ["model.", "params."])
def test_a_number_beside_the_weights_does_not_hide_them(start: str) -> None:
    weights = WEIGHTS if start == "model." else IN_FLAX
    source = {f"{start}{name}": array for name, array in weights.items()} | {"epoch": np.int64(3)}
    with pytest.raises(WeightsError, match=r"1 problem with its 7 tensors(?s:.*)unexpected \(1\):\n +epoch"):
        resolve(source, TABLE)


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
def test_ema_weights_are_taken_only_on_request(twin: str, key: str) -> None:
    package, make = TWINS[twin]
    averaged, layer = layer_weights(seed=1), make()
    source = {"state_dict": WEIGHTS, key: {f"module.{k}": v for k, v in averaged.items()}}
    package.load_weights(layer, source)
    assert_same_bits(package.export_weights(layer), WEIGHTS)
    package.load_weights(layer, source, use_ema=True)
    assert_same_bits(package.export_weights(layer), averaged)


def test_missing_ema_weights_are_an_error() -> None:
    with pytest.raises(WeightsError, match="no 'state_dict_ema' or 'model_ema' or 'average'; its top level"):
        resolve({"state_dict": WEIGHTS, "epoch": 1}, TABLE, use_ema=True)


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema"])
def test_ema_weights_alone_are_not_taken_without_request(key: str) -> None:
    with pytest.raises(WeightsError, match=f"only averaged weights, '{key}'"):
        resolve({key: WEIGHTS, "epoch": 1}, TABLE)


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("prefix", ["network.0.1.attn", "network/0/1/attn", "network.0.1.attn."])
def test_prefix_selects_one_layer_of_a_model(naming: str, prefix: str) -> None:
    found = resolve({"state_dict": inside_a_model(naming)}, TABLE, prefix=prefix)
    for name, array in layer_weights(seed=1).items():
        assert np.array_equal(found[name], array)


def test_prefix_with_nothing_below_lists_prefixes_with_a_layer() -> None:
    for prefix in ("network.0.2.attn", ""):
        with pytest.raises(WeightsError, match=r"prefix='network\.0\.0\.attn', 'network\.0\.1\.attn'"):
            resolve(inside_a_model("torch"), TABLE, prefix=prefix)


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
    reference, in_torch, in_jax = torch_layer(to), torch_layer(to), jax_layer(to)
    reference.load_state_dict({name: to_tensor(array) for name, array in weights.items()})
    outlook_torch.load_weights(in_torch, weights)
    outlook_jax.load_weights(in_jax, weights)
    expected = outlook_torch.export_weights(reference)
    assert {array.dtype for array in expected.values()} == {DTYPES[to]}
    assert_same_bits(outlook_torch.export_weights(in_torch), expected)
    assert_same_bits(outlook_jax.export_weights(in_jax), expected)


@both_twins
def test_overflow_of_the_parameters_dtype_is_a_warning(twin: str) -> None:
    package, make = TWINS[twin]
    with pytest.warns(RuntimeWarning, match="overflow"):
        package.load_weights(make("float16"), layer_weights("float64") | {"v.bias": np.full(DIM, 1e6)})


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


def test_jax_twin_loads_nnx_states() -> None:
    source, layer = jax_layer(), jax_layer()
    outlook_jax.load_weights(source, WEIGHTS)
    state = nnx.state(source, nnx.Param)
    for given_state in (state, nnx.to_pure_dict(state), dict(nnx.to_flat_state(state))):
        outlook_jax.load_weights(layer, layer_weights(seed=1))
        outlook_jax.load_weights(layer, given_state)
        assert_same_bits(outlook_jax.export_weights(layer), WEIGHTS)


def test_an_abstract_layer_computes_once_its_weights_are_loaded() -> None:
    x = np.random.default_rng(0).standard_normal((1, 4, 5, DIM)).astype(np.float32)
    expected = outlook_torch.OutlookAttention(DIM, HEADS, qkv_bias=True, device="meta")
    outlook_torch.load_weights(expected, WEIGHTS)
    layer = nnx.eval_shape(lambda: outlook_jax.OutlookAttention(DIM, HEADS, qkv_bias=True, rngs=nnx.Rngs(0)))
    outlook_jax.load_weights(layer, WEIGHTS, rngs=nnx.Rngs(3))
    assert_same_bits(outlook_jax.export_weights(layer), WEIGHTS)
    in_training = [np.asarray(nnx.jit(lambda layer, x: layer(x))(layer, x)) for _ in range(2)]
    assert np.isfinite(in_training).all()
    assert not np.array_equal(*in_training)  # the stream goes on
    layer.eval()
    found = np.asarray(nnx.jit(lambda layer, x: layer(x))(layer, x))
    assert np.allclose(found, expected.eval()(torch.from_numpy(x)).detach(), atol=1e-5)


def test_an_abstract_volo_computes_once_its_weights_are_loaded() -> None:
    config = small_config(drop_path_rate=0.3, attn_drop_rate=0.1)
    weights = draw_weights(config)
    made = outlook_jax.VOLO(config, param_dtype=np.float64, rngs=nnx.Rngs(0))
    model = nnx.eval_shape(lambda: outlook_jax.VOLO(config, param_dtype=np.float64, rngs=nnx.Rngs(0)))
    outlook_jax.load_weights(model, weights, rngs=nnx.Rngs(dropout=1))
    assert_same_bits(outlook_jax.export_weights(model), weights)
    found, expected = (dict(nnx.to_flat_state(nnx.state(twin))) for twin in (model, made))
    assert found.keys() == expected.keys()
    for path, variable in found.items():
        assert variable.get_value().dtype == expected[path].get_value().dtype, path
        if path[-1] in ("rate", "count"):
            assert variable.get_value() == expected[path].get_value(), path
    keys = [jax.random.key_data(variable.get_value()).tolist() for path, variable in found.items() if path[-1] == "key"]
    assert len(keys) > 5
    assert len({tuple(key) for key in keys}) == len(keys)
    images = last(draw_images(config)).astype(np.float64)
    logits, aux, _ = jit(lambda model, x: model.forward_train(x))(model, images)
    assert np.isfinite(logits).all()
    assert np.isfinite(aux).all()


def test_an_abstract_model_without_random_streams_says_what_to_pass_and_loads_nothing() -> None:
    layer = nnx.eval_shape(jax_layer)
    with pytest.raises(ValueError, match=r"random streams \(attn_drop\.rngs\.count, .*\): pass rngs=nnx\.Rngs\(seed\)"):
        outlook_jax.load_weights(layer, WEIGHTS)
    assert isinstance(layer.v.kernel.get_value(), jax.ShapeDtypeStruct)


@both_twins
def test_model_of_another_package_is_named(twin: str) -> None:
    package, _ = TWINS[twin]
    stranger = nn.Linear(2, 2) if twin == "torch" else nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="no weight table for Linear"):
        package.load_weights(stranger, WEIGHTS)


def test_timms_model_is_refused_with_a_remedy() -> None:
    with pytest.raises(TypeError, match=r"OutlookAttention, a class of timm: .* its own load_state_dict"):
        outlook_torch.load_weights(TimmOutlookAttention(DIM, HEADS), WEIGHTS)


def test_a_model_as_source_says_what_to_pass_instead() -> None:
    for source, instead in ((torch_layer(), r"model\.state_dict\(\)"), (jax_layer(), r"nnx\.state\(model\)")):
        with pytest.raises(TypeError, match=f"OutlookAttention is not a source of weights: for a model pass {instead}"):
            unwrap(open_checkpoint)(source)  # without the tests' own checks of types
    with pytest.raises(TypeError, match="list is not a source of weights: pass a path"):
        unwrap(open_checkpoint)([1])


@pytest.mark.parametrize("given", ["state", "flat", "npz"])
def test_a_complete_nnx_state_loads_without_its_random_streams(tmp_path: Path, given: str) -> None:
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
def test_layers_of_other_packages_loaded_into_either_twin_give_the_same_outputs(other: str) -> None:
    torch.manual_seed(0)
    layer = OTHERS[other]().double().eval()
    x = torch.randn(2, 5, 7, DIM, dtype=torch.float64)
    expected = layer(x).detach().numpy()
    in_torch, in_jax = torch_layer("float64"), jax_layer("float64")
    outlook_torch.load_weights(in_torch, layer.state_dict())
    outlook_jax.load_weights(in_jax, layer.state_dict())
    for found in (in_torch(x).detach().numpy(), np.asarray(in_jax(jnp.asarray(x.numpy())))):
        assert np.abs(found - expected).max() <= 1e-12 * np.abs(expected).max()
