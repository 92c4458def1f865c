"""The Linen modules against the NNX ones, and used as Linen's are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.errors
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx, traverse_util

import outlook_jax
from outlook_common.weights import table_for
from outlook_jax import linen
from parity_tests.support.arithmetic import QUICKLY
from parity_tests.support.runners import relative_error
from parity_tests.support.volo import (
    FOUR_STAGES,
    draw_images,
    draw_weights,
    jax_logits,
    jax_volo,
    jit,
    last,
    small_config,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

Array = np.ndarray

CONFIG = small_config(**FOUR_STAGES, qkv_bias=True)
IMAGES = jnp.asarray(last(draw_images(CONFIG, batch=3)))
BOX = (0, 1, 2, 3)
MODULE = linen.VOLO(CONFIG, param_dtype="float64")
DROPPING = linen.VOLO(
    small_config(**FOUR_STAGES, attn_drop_rate=0.2, drop_path_rate=0.2, use_mix_token=True), param_dtype="float64"
)


def quickly(function: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(function, compiler_options=QUICKLY)


def names(tree: Any) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep=".")


def same(ours: Any, theirs: Any, bound: float = 1e-12) -> None:
    ours, theirs = names(ours), names(theirs)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        if np.abs(array).max() == 0:
            assert np.abs(ours[name]).max() == 0, name
        else:
            assert relative_error(np.asarray(ours[name]), np.asarray(array)) <= bound, name


@pytest.fixture(scope="module")
def weights() -> dict[str, Array]:
    return draw_weights(CONFIG, 5)


@pytest.fixture(scope="module")
def variables(weights: dict[str, Array]) -> linen.Variables:
    return linen.load_variables(MODULE, weights)


def test_one_key_initializes_and_names_and_shapes_are_nnxs() -> None:
    variables = jax.eval_shape(MODULE.init, jax.random.key(0), IMAGES)
    found = {
        name: leaf.shape
        for collection in ("params", "batch_stats")
        for name, leaf in names(variables[collection]).items()
    }
    assert found == {entry.flax: entry.flax_shape for entry in table_for(CONFIG).entries}
    assert set(variables) == {"params", "batch_stats"}
    assert "network.0.0.attn.v.kernel" in found


def test_initial_weights_are_nnxs_and_the_draws_of_the_key(variables: linen.Variables) -> None:
    small = linen.VOLO(
        small_config(layers=(1, 1), post_layers=None, global_pool="avg", use_aux_head=False), param_dtype="float64"
    )
    init = quickly(small.init)
    first, again, other = (init(jax.random.key(seed), IMAGES) for seed in (0, 0, 1))
    same(first["params"], again["params"], 0)
    kernel = "network.2.0.attn.qkv.kernel"
    assert not jnp.array_equal(names(first["params"])[kernel], names(other["params"])[kernel])
    assert abs(float(names(first["params"])[kernel].std()) - 0.02) < 0.002
    assert float(names(first["batch_stats"])["patch_embed.conv.1.var"].min()) == 1.0
    assert small.apply(first, IMAGES).shape == (3, 7)


def test_evaluation_equals_nnx_whichever_way_it_is_asked_for(
    variables: linen.Variables, weights: dict[str, Array]
) -> None:
    expected = jax_logits(jax_volo(CONFIG, weights, deterministic=True), np.asarray(IMAGES))
    evaluate = linen.VOLO(CONFIG, param_dtype="float64", deterministic=True)
    for module, mode in ((MODULE, {}), (MODULE, {"train": False}), (MODULE, {"deterministic": True}), (evaluate, {})):
        logits = quickly(lambda v, x, module=module, mode=mode: module.apply(v, x, **mode))(variables, IMAGES)
        assert relative_error(np.asarray(logits), expected) <= 1e-12


def test_training_with_token_labels_equals_nnx_with_gradients_and_statistics(
    variables: linen.Variables, weights: dict[str, Array]
) -> None:
    def loss(out: tuple) -> jax.Array:
        cls, aux, _ = out
        return jnp.sin(cls).sum() + jnp.cos(aux).sum()

    graph, state = nnx.split(jax_volo(CONFIG, weights))

    @quickly
    def theirs(state: Any, x: jax.Array) -> tuple:
        def objective(model: outlook_jax.VOLO) -> tuple:
            out = model.forward_train(x, BOX)
            return loss(out), out

        twin = nnx.merge(graph, state)
        (value, out), gradients = nnx.value_and_grad(objective, has_aux=True)(twin)
        return (value, (out, nnx.state(twin, nnx.BatchStat))), gradients

    @quickly
    def ours(variables: Any, x: jax.Array) -> tuple:
        def run(parameters: Any) -> tuple:
            out, updates = MODULE.apply(
                {**variables, "params": parameters},
                x,
                train=True,
                token_labels=True,
                mix_box=BOX,
                mutable=["batch_stats"],
            )
            return loss(out), (out, updates)

        return jax.value_and_grad(run, has_aux=True)(variables["params"])

    (value, (out, updates)), gradients = ours(variables, IMAGES)
    (expected, (their_out, statistics)), their_gradients = theirs(state, IMAGES)
    assert relative_error(np.asarray(value), np.asarray(expected)) <= 1e-12
    for found, other in zip(out[:2], their_out[:2], strict=True):
        assert relative_error(np.asarray(found), np.asarray(other)) <= 1e-12
    as_strings = {"params": {}, "batch_stats": {}}
    for collection, state in (("params", their_gradients), ("batch_stats", statistics)):
        flat = {tuple(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}
        as_strings[collection] = traverse_util.unflatten_dict(flat)
    same(gradients, as_strings["params"])
    same(updates["batch_stats"], as_strings["batch_stats"])
    changed = names(updates["batch_stats"])["patch_embed.conv.1.mean"]
    assert not jnp.array_equal(changed, names(variables["batch_stats"])["patch_embed.conv.1.mean"])


def test_features_and_intermediates_equal_nnx(variables: linen.Variables, weights: dict[str, Array]) -> None:
    twin = jax_volo(CONFIG, weights, deterministic=True)
    tokens = quickly(lambda v, x: MODULE.apply(v, x, method="forward_features"))(variables, IMAGES)
    expected = jit(lambda model, x: model.forward_features(x))(twin, IMAGES)
    assert relative_error(np.asarray(tokens), np.asarray(expected)) <= 1e-12
    maps = quickly(lambda v, x: MODULE.apply(v, x, intermediates_only=True, method="forward_intermediates"))
    theirs = jit(lambda model, x: model.forward_intermediates(x, intermediates_only=True))(twin, IMAGES)
    found = maps(variables, IMAGES)
    assert len(found) == len(theirs) == 4
    for ours, other in zip(found, theirs, strict=True):
        assert relative_error(np.asarray(ours), np.asarray(other)) <= 1e-12


@pytest.mark.long(reason="compiles what draws all weights, and a training pass")
def test_random_streams_are_needed_in_training_alone() -> None:
    module, images = DROPPING, IMAGES
    variables = quickly(module.init)(jax.random.key(0), images)

    @quickly
    def train(key: jax.Array) -> tuple:
        out, _ = module.apply(
            variables, images, train=True, token_labels=True, rngs={"dropout": key}, mutable=["batch_stats"]
        )
        return out

    draws = [train(jax.random.key(seed)) for seed in (2, 2, 3)]
    assert jnp.array_equal(draws[0][0], draws[1][0])
    assert not jnp.array_equal(draws[0][0], draws[2][0])
    assert draws[0][2] == draws[1][2]
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
        module.apply(variables, images, train=True, mutable=["batch_stats"])


def test_nothing_random_needs_no_stream(variables: linen.Variables) -> None:
    mixing = linen.VOLO(small_config(**FOUR_STAGES, qkv_bias=True, use_mix_token=True), param_dtype="float64")
    train = quickly(lambda v, x: mixing.apply(v, x, train=True, mutable=["batch_stats"]))
    out, updates = train(variables, IMAGES)
    assert out.shape == (3, 7)
    assert updates["batch_stats"].keys() == variables["batch_stats"].keys()
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
        mixing.apply(variables, IMAGES, train=True, token_labels=True, mutable=["batch_stats"])


def test_statistics_change_only_where_linen_lets_them(variables: linen.Variables) -> None:
    with pytest.raises(flax.errors.ModifyScopeVariableError, match="batch_stats"):
        quickly(lambda v, x: MODULE.apply(v, x, train=True))(variables, IMAGES)
    _, updates = quickly(lambda v, x: MODULE.apply(v, x, mutable=["batch_stats"]))(variables, IMAGES)
    same(updates.get("batch_stats", variables["batch_stats"]), variables["batch_stats"], 0)


def test_a_model_inside_a_linen_model(variables: linen.Variables) -> None:
    class Doubled(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
            return 2 * linen.VOLO(CONFIG, param_dtype="float64", name="backbone")(x, train=train)

    nested = {collection: {"backbone": tree} for collection, tree in variables.items()}
    doubled = quickly(Doubled().apply)(nested, IMAGES)
    assert relative_error(np.asarray(doubled), 2 * np.asarray(quickly(MODULE.apply)(variables, IMAGES))) <= 1e-12
    shapes = jax.eval_shape(Doubled().init, jax.random.key(0), IMAGES)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, nested)


def test_files_of_either_framework_become_variables(
    variables: linen.Variables, weights: dict[str, Array], tmp_path: Path
) -> None:
    twin = jax_volo(CONFIG, weights)
    outlook_jax.save_weights(twin, tmp_path / "volo.safetensors")
    (tmp_path / "volo.msgpack").write_bytes(flax.serialization.to_bytes(variables))
    for source in (tmp_path / "volo.safetensors", tmp_path / "volo.msgpack"):
        same(linen.load_variables(MODULE, source), variables, 0)
    same(linen.variables_of(twin), variables, 0)
    layer = linen.OutlookAttention(12, num_heads=2, stride=2, qkv_bias=True, param_dtype="float64")
    found = linen.load_variables(layer, tmp_path / "volo.safetensors", prefix="network.0.0.attn")
    same(found, {"params": variables["params"]["network"]["0"]["0"]["attn"]}, 0)


def test_variables_that_do_not_fit_are_named(variables: linen.Variables) -> None:
    with pytest.raises(ValueError, match=r"batch_stats: patch_embed\.conv\.1\.mean is missing.*more"):
        MODULE.apply({"params": variables["params"]}, IMAGES)
    wrong = jax.tree.map(lambda leaf: leaf, variables)
    wrong["params"]["head"]["bias"] = jnp.zeros(8)
    with pytest.raises(ValueError, match=r"1 of .* params: head\.bias has shape \(8,\), expected \(7,\)"):
        MODULE.apply(wrong, IMAGES)
    with pytest.raises(ValueError, match="train=True contradicts deterministic=True"):
        MODULE.apply(variables, IMAGES, train=True, deterministic=True)
