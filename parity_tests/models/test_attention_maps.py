"""Attention maps: both twins against each other, and against the layers whose weights they are."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm.models.volo
import torch
from flax import nnx

import outlook_jax
import outlook_torch
from outlook_common import window_grid
from outlook_common.explain import mixed_at, place_weights
from parity_tests.support.arithmetic import QUICKLY
from parity_tests.support.oracle import mix
from parity_tests.support.runners import bits, layer_pair, relative_error
from parity_tests.support.volo import (
    FOUR_STAGES,
    draw_images,
    draw_weights,
    jax_logits,
    jax_volo,
    last,
    small_config,
    torch_volo,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

Array = np.ndarray
Maps = dict[str, Array]

# Rates, so that a map that is taken in training shows; a map that the stride of the windows does not divide.
CONFIG = small_config(**FOUR_STAGES, img_size=(24, 40), attn_drop_rate=0.3, drop_path_rate=0.3, qkv_bias=True)
IMAGES = draw_images(CONFIG)
SHAPES = {
    "network.0.0.attn": (2, 3, 5, 2, 9, 9),
    "network.2.0.attn": (2, 4, 15, 15),
    "network.2.1.attn": (2, 4, 15, 15),
    "network.3.0.attn": (2, 3, 15, 15),
    "network.4.0.attn": (2, 2, 15, 15),
    "post_network.0.attn": (2, 2, 1, 16),
    "post_network.1.attn": (2, 2, 1, 16),
}


def torch_maps(model: torch.nn.Module, images: Array) -> Maps:
    with torch.no_grad():
        return {
            path: weights.numpy() for path, weights in outlook_torch.attention_maps(model, torch.tensor(images)).items()
        }


def jax_maps(model: nnx.Module, images: Array) -> Maps:
    run = jax.jit(outlook_jax.attention_maps, compiler_options=QUICKLY)
    return {path: np.asarray(weights) for path, weights in run(model, jnp.asarray(images)).items()}


@pytest.fixture(scope="module")
def weights() -> dict[str, Array]:
    return draw_weights(CONFIG, 3)


@pytest.fixture(scope="module")
def maps(weights: dict[str, Array]) -> Maps:
    return torch_maps(torch_volo(CONFIG, weights), IMAGES)


def test_both_twins_give_the_same_maps_whose_rows_sum_to_one(maps: Maps, weights: dict[str, Array]) -> None:
    theirs = jax_maps(jax_volo(CONFIG, weights), last(IMAGES))
    assert {path: found.shape for path, found in maps.items()} == SHAPES
    assert list(maps) == list(SHAPES)
    assert theirs.keys() == maps.keys()
    for path, found in maps.items():
        assert relative_error(theirs[path], found) <= 1e-12, path
        for twin in (found, theirs[path]):
            assert np.abs(twin.sum(axis=-1) - 1).max() <= 1e-12, path
            assert twin.std() > 1e-3 / twin.shape[-1], path  # no uniform weights, of which any would do


def recomputed(layer: Any, x: torch.Tensor, weights: Array) -> torch.Tensor:
    """Return what a layer gives, by its maps and its projections of values alone."""
    B, *_, C = x.shape
    N = weights.shape[3] if weights.ndim == 6 else weights.shape[1]
    if weights.ndim == 6:  # by the oracle, window by window
        cfg, (_, H, W, _) = layer.config, x.shape
        grid = window_grid((H, W), cfg.kernel_size, cfg.stride, cfg.padding)
        value = layer.v(x).reshape(B, H, W, N, C // N).numpy()
        out = mix(value, weights, np.zeros_like(value), grid)[0]
    else:
        project = layer.qkv if hasattr(layer, "qkv") else layer.kv
        value = project(x)[..., -C:].reshape(B, -1, N, C // N).numpy()
        out = np.einsum("bntT,bTnd->btnd", weights, value)
    shape = x.shape if weights.shape[2] != 1 else (B, 1, C)
    return layer.proj(torch.from_numpy(out).reshape(shape))


def test_the_output_of_every_layer_follows_from_its_map(maps: Maps, weights: dict[str, Array]) -> None:
    model = torch_volo(CONFIG, weights).eval()
    calls: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(path: str) -> Callable[..., None]:
        return lambda layer, args, out: calls.update({path: (args[0], out)})

    for path in maps:
        model.get_submodule(path).register_forward_hook(keep(path))
    with torch.no_grad():
        model(torch.tensor(IMAGES))
        for path, (x, out) in calls.items():
            expected = recomputed(model.get_submodule(path), x, maps[path])
            assert relative_error(out.numpy(), expected.numpy()) <= 1e-12, path
    assert calls.keys() == maps.keys()


@pytest.mark.parametrize("implementation", ["reference", "composite"])
def test_maps_do_not_depend_on_the_implementation(maps: Maps, weights: dict[str, Array], implementation: str) -> None:
    torch_model = outlook_torch.VOLO(CONFIG, implementation=implementation, dtype=torch.float64)
    outlook_torch.load_weights(torch_model, weights)
    jax_model = jax_volo(CONFIG, weights, implementation=implementation)
    for found in (torch_maps(torch_model, IMAGES), jax_maps(jax_model, last(IMAGES))):
        assert all(relative_error(found[path], expected) <= 1e-12 for path, expected in maps.items())


@pytest.mark.parametrize("options", [{"scan_layers": False}, {"grad_checkpointing": True}], ids=str)
def test_loops_and_recomputation_lose_no_map(maps: Maps, weights: dict[str, Array], options: dict[str, bool]) -> None:
    torch_model, jax_model = torch_volo(CONFIG, weights), jax_volo(CONFIG, weights)
    jax_model.scan_layers = options.get("scan_layers", True)
    for model in (torch_model, jax_model):
        model.set_grad_checkpointing(options.get("grad_checkpointing", False))
    for found in (torch_maps(torch_model, IMAGES), jax_maps(jax_model, last(IMAGES))):
        assert all(relative_error(found[path], expected) <= 1e-12 for path, expected in maps.items())


def test_a_compiled_model_has_the_same_maps_under_the_same_names(maps: Maps, weights: dict[str, Array]) -> None:
    model = torch_volo(CONFIG, weights)
    model.network[0].compile(backend="eager")
    found = torch_maps(torch.compile(model, backend="eager"), IMAGES)
    assert list(found) == list(maps)
    assert all(np.array_equal(found[path], expected) for path, expected in maps.items())


def test_the_torch_model_stays_as_it_is(weights: dict[str, Array]) -> None:
    model = torch_volo(CONFIG, weights)
    model.network[0].eval()  # a part that is frozen
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    maps = outlook_torch.attention_maps(model, torch.tensor(IMAGES))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(found.requires_grad for found in maps.values())
    with pytest.raises(ValueError, match="in_chans=3"):
        outlook_torch.attention_maps(model, torch.tensor(last(IMAGES)))
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_jax_model_stays_as_it_is(weights: dict[str, Array]) -> None:
    model = jax_volo(CONFIG, weights)
    graph, before = nnx.split(model)
    values = jax.tree.map(bits, nnx.to_pure_dict(before))
    outlook_jax.attention_maps(model, jnp.asarray(last(IMAGES)))
    after_graph, after = nnx.split(model)
    assert after_graph == graph
    same = jax.tree.map(lambda a, b: np.array_equal(a, bits(b)), values, nnx.to_pure_dict(after))
    assert all(jax.tree.leaves(same))
    assert model.deterministic is False
    view = nnx.view(model, deterministic=True, use_running_average=True)
    expected = jax_logits(jax_volo(CONFIG, weights, deterministic=True), IMAGES.transpose(0, 2, 3, 1))
    assert relative_error(jax_logits(view, last(IMAGES)), expected) <= 1e-12


def test_a_layer_alone_and_float32_at_least() -> None:
    torch_layer, jax_layer = layer_pair(12, 3, stride=2)
    x = np.random.default_rng(5).standard_normal((2, 5, 4, 12))
    ours, theirs = torch_maps(torch_layer, x), jax_maps(jax_layer, x)
    assert list(ours) == list(theirs) == [""]
    assert relative_error(theirs[""], ours[""]) <= 1e-12
    low = outlook_torch.attention_maps(torch_layer.bfloat16(), torch.tensor(x).bfloat16())[""]
    assert low.dtype == torch.float32
    assert torch.allclose(low.sum(-1), torch.ones(()), atol=1e-6)
    jax_low = outlook_jax.OutlookAttention(12, 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert outlook_jax.attention_maps(jax_low, jnp.asarray(x))[""].dtype == jnp.float32


def test_maps_of_a_timm_model_with_our_layer() -> None:
    stages = {"downsamples": (True, False), "outlook_attention": (True, False)}
    model = timm.models.volo.VOLO((1, 1), img_size=32, embed_dims=(12, 24), num_heads=(2, 4), **stages)
    maps = outlook_torch.attention_maps(outlook_torch.accelerate(model), torch.randn(1, 3, 32, 32))
    assert list(maps) == ["network.0.0.attn"]


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear contains no attention layer of this package"):
        outlook_torch.attention_maps(torch.nn.Linear(2, 2), torch.ones(1, 2))
    with pytest.raises(ValueError, match="Linear contains no attention layer of this package"):
        outlook_jax.attention_maps(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), jnp.ones((1, 2)))


# What a place mixes


@pytest.mark.parametrize("place", [(0, 0), (3, 4), (5, 9), (2, 0)], ids=str)
def test_what_a_place_mixes_is_what_the_op_gives_for_one_value_after_another(
    maps: Maps, place: tuple[int, int]
) -> None:
    (weights, *_), (H, W) = maps["network.0.0.attn"], (6, 10)
    grid = window_grid((H, W), 3, 2, 1)
    found = mixed_at(weights, grid, place)
    one_hot = np.eye(H * W).reshape(H * W, H, W, 1, 1)  # a batch of maps, each with one value
    logits = np.log(weights)[None].repeat(H * W, axis=0)
    out = outlook_torch.outlook_attention(
        torch.tensor(one_hot).expand(-1, -1, -1, 2, -1), torch.tensor(logits), stride=2
    ).numpy()
    mixed = out[:, *place, :, 0].T.reshape(2, H, W)
    windows = np.prod([sum(0 <= at + 1 - 2 * i <= 2 for i in range(n)) for at, n in zip(place, (3, 5), strict=True)])
    assert relative_error(found * windows, mixed) <= 1e-12


def test_weights_of_a_place_and_of_the_class_token(maps: Maps) -> None:
    one = {path: weights[0] for path, weights in maps.items()}
    found = {weights.path: weights for weights in place_weights(one, CONFIG, (24, 40), (13, 17))}
    assert [(path, weights.kind) for path, weights in found.items()] == [
        ("network.0.0.attn", "outlook"),
        ("post_network.0.attn", "class"),
        ("post_network.1.attn", "class"),
    ]
    outlook, token = found["network.0.0.attn"], found["post_network.1.attn"]
    grid = window_grid((6, 10), 3, 2, 1)
    assert np.array_equal(outlook.weights, mixed_at(one["network.0.0.attn"], grid, (3, 4)).mean(axis=0))
    assert np.array_equal(token.weights.ravel(), one["post_network.1.attn"].mean(axis=0)[0, 1:])
    assert token.weights.shape == (3, 5)
    for weights in found.values():
        assert abs(weights.weights.sum() + weights.rest - 1) <= 1e-12
    corner = place_weights(one, CONFIG, (24, 40), (0, 0))[0]
    assert corner.rest > 0.1  # beyond the border
    with pytest.raises(ValueError, match="place 24,0 lies outside the image of 24x40 pixels"):
        place_weights(one, CONFIG, (24, 40), (24, 0))
