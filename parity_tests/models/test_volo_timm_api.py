"""VOLO's interface as users of timm expect it: features, intermediates, pruning, new heads, names."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm.models.volo
import torch
from flax import nnx
from timm.data import resolve_model_data_config
from timm.models._features import FeatureGetterNet

import outlook_jax
import outlook_torch
from outlook_common import VOLO_VARIANTS
from outlook_common.weights import table_for
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
    timm_volo,
    torch_volo,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

FORWARD = 1e-12


@pytest.mark.parametrize("name", VOLO_VARIANTS)
def test_features_and_names_shapes_and_order_of_the_weights_are_timms(name: str) -> None:
    with torch.device("meta"):
        oracle, ours = timm.create_model(name), outlook_torch.volo(name)
    truth = oracle.state_dict()
    assert list(ours.feature_info) == oracle.feature_info
    assert resolve_model_data_config(ours) == resolve_model_data_config(oracle)
    assert {key: oracle.pretrained_cfg[key] for key in ours.pretrained_cfg} == ours.pretrained_cfg
    assert [(key, value.shape) for key, value in ours.state_dict().items()] == [
        (key, value.shape) for key, value in truth.items()
    ]
    assert [(entry.torch, entry.shape) for entry in table_for(ours.config).entries] == [
        (key, tuple(value.shape)) for key, value in truth.items()
    ]


@pytest.mark.parametrize("name", VOLO_VARIANTS)
def test_preparation_of_the_images_is_timms(name: str) -> None:
    variant, cfg = VOLO_VARIANTS[name], timm.get_pretrained_cfg(name)
    assert (variant.crop_pct, variant.mean, variant.std, variant.input_size, variant.interpolation) == (
        cfg.crop_pct,
        cfg.mean,
        cfg.std,
        cfg.input_size,
        cfg.interpolation,
    )
    assert (variant.license, variant.hub_id) == (cfg.license, cfg.hf_hub_id)


@pytest.mark.parametrize(
    ("indices", "norm", "stop_early"),
    [(None, False, False), (2, True, False), ([0, -1], True, False), ([1], False, True), ([0], True, True)],
)
def test_intermediates_equal_timms(indices: Any, norm: bool, stop_early: bool) -> None:
    config = small_config(**FOUR_STAGES)
    weights, images = draw_weights(config), torch.from_numpy(draw_images(config))
    request = {"indices": indices, "norm": norm, "stop_early": stop_early}
    with torch.no_grad():
        truth, maps = timm_volo(config, weights).eval().forward_intermediates(images, **request)
        ours, our_maps = torch_volo(config, weights).eval().forward_intermediates(images, **request)
    assert relative_error(ours.numpy(), truth.numpy()) <= FORWARD
    for exact, our in zip(maps, our_maps, strict=True):
        assert relative_error(our.numpy(), exact.numpy()) <= FORWARD


def test_intermediates_of_the_twins_are_equal_in_either_layout() -> None:
    config = small_config()
    weights, images = draw_weights(config), draw_images(config)
    model, twin = torch_volo(config, weights).eval(), jax_volo(config, weights, deterministic=True)

    @jit
    def forward(twin: outlook_jax.VOLO, images: jax.Array) -> Any:
        early = twin.forward_intermediates(images, [0], stop_early=True)
        alone = twin.forward_intermediates(images, 1, norm=True, output_fmt="NCHW", intermediates_only=True)
        return early, alone, twin.forward_intermediates(images, 1, norm=True)

    (early, early_maps), alone, (features, maps) = forward(twin, last(images))
    with torch.no_grad():
        x = torch.from_numpy(images)
        truth, truth_maps = model.forward_intermediates(x, [0], stop_early=True, output_fmt="NHWC")
        assert relative_error(np.asarray(early), truth.numpy()) <= FORWARD
        assert relative_error(np.asarray(early_maps[0]), truth_maps[0].numpy()) <= FORWARD
        truth, truth_maps = model.forward_intermediates(x, 1, norm=True)
    info = model.feature_info[-1]
    assert truth_maps[0].shape == (2, info["num_chs"], 32 // info["reduction"], 32 // info["reduction"])
    assert relative_error(np.asarray(features), truth.numpy()) <= FORWARD
    assert relative_error(np.asarray(alone[0]), truth_maps[0].numpy()) <= FORWARD
    np.testing.assert_array_equal(maps[0], last(np.asarray(alone[0])))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("indices", [(0, 2), (1,), (0,), (-1,), 3], ids=str)
def test_pruned_to_some_stages_the_maps_are_those_of_timms_wrapper(indices: Any, norm: bool) -> None:
    config = small_config(**FOUR_STAGES)
    weights, images = draw_weights(config), torch.from_numpy(draw_images(config))
    oracle = FeatureGetterNet(timm_volo(config, weights).eval(), indices, norm=norm)
    ours = FeatureGetterNet(torch_volo(config, weights).eval(), indices, norm=norm)
    assert ours.out_indices == oracle.out_indices
    assert ours.feature_info.channels() == oracle.feature_info.channels()
    assert ours.feature_info.reduction() == oracle.feature_info.reduction()
    assert [*ours.model.state_dict()] == [*oracle.model.state_dict()]
    assert ours.model.num_features == ours.model.head_hidden_size == oracle.model.num_features
    with torch.no_grad():
        truth, maps = oracle(images), ours(images)
        features = oracle.model.forward_features(images)
        assert relative_error(ours.model.forward_features(images).flatten(1).numpy(), features.flatten(1).numpy()) < (
            FORWARD
        )
    for exact, our in zip(truth, maps, strict=True):
        assert relative_error(our.numpy(), exact.numpy()) <= FORWARD

    twin = jax_volo(config, weights, deterministic=True)
    assert twin.prune_intermediate_layers(indices, prune_norm=not norm) == ours.out_indices
    assert twin.feature_info == ours.model.feature_info
    variables = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(twin, (nnx.Param, nnx.BatchStat)))]
    named = {entry.torch: entry.flax for entry in table_for(config).entries}
    assert {named[name] for name in ours.model.state_dict()} == set(variables)
    forward = jit(
        lambda twin, x: twin.forward_intermediates(
            x, ours.out_indices, norm=norm, output_fmt="NCHW", intermediates_only=True
        )
    )
    for exact, our in zip(truth, forward(twin, last(images.numpy())), strict=True):
        assert relative_error(np.asarray(our), exact.numpy()) <= FORWARD


def test_heads_that_do_not_fit_what_remains_go_though_it_is_said_they_stay() -> None:
    config = small_config(**FOUR_STAGES)
    weights = draw_weights(config)
    oracle, ours = timm_volo(config, weights), torch_volo(config, weights)
    twin = jax_volo(config, weights)
    for model in (oracle, ours, twin):
        assert model.prune_intermediate_layers([1], prune_head=False) == [1]
    assert [*ours.state_dict()] == [*oracle.state_dict()]
    assert ours.config == twin.config
    assert (twin.num_classes, twin.cls_token, twin.post_network, twin.aux_head) == (0, None, None, None)


@pytest.mark.parametrize("prune", [{}, {"prune_norm": True, "prune_head": False}], ids=str)
def test_pruned_models_get_new_heads_or_keep_theirs(prune: dict[str, Any]) -> None:
    config = small_config(use_mix_token=True)
    weights, images = draw_weights(config), draw_images(config)
    model, twin = torch_volo(config, weights).eval(), jax_volo(config, weights, deterministic=True)
    for each, weights_of in ((model, outlook_torch.export_weights), (twin, outlook_jax.export_weights)):
        assert each.prune_intermediate_layers(**prune) == [1]
        if each.pruned:
            with pytest.raises(TypeError, match="was pruned by prune_intermediate_layers"):
                weights_of(each)
        else:
            assert weights_of(each).keys() < weights.keys()
        assert each.num_classes == (0 if prune.get("prune_head", True) else 7)
    if prune.get("prune_head", True):
        model.reset_classifier(5, "avg")
        twin.reset_classifier(5, "avg", rngs=nnx.Rngs(0))
        twin.head.kernel[...] = jnp.asarray(model.head.weight.detach().numpy().T)
    with torch.no_grad():
        logits = model(torch.from_numpy(images)).numpy()
    assert relative_error(jax_logits(twin, last(images)), logits) <= FORWARD


def test_forward_head_gives_the_pooled_features_before_the_classifier() -> None:
    config = small_config()
    weights, images = draw_weights(config), draw_images(config)
    model, twin = torch_volo(config, weights).eval(), jax_volo(config, weights, deterministic=True)
    with torch.no_grad():
        features = model.forward_features(torch.from_numpy(images))
        pooled, logits = model.forward_head(features, pre_logits=True), model.forward_head(features)
        oracle = timm_volo(config, weights).eval()
        assert relative_error(features.numpy(), oracle.forward_features(torch.from_numpy(images)).numpy()) <= FORWARD
    np.testing.assert_array_equal(pooled.numpy(), features[:, 0].numpy())
    theirs = jnp.asarray(features.numpy())
    np.testing.assert_array_equal(twin.forward_head(theirs, pre_logits=True), pooled.numpy())
    assert relative_error(np.asarray(twin.forward_head(theirs)), logits.numpy()) <= FORWARD


def test_new_heads_replace_the_old_ones() -> None:
    config = small_config()
    weights, images = draw_weights(config), draw_images(config)
    model, twin = torch_volo(config, weights).eval(), jax_volo(config, weights, deterministic=True)
    for classes, pool in ((0, "avg"), (5, "token")):
        model.reset_classifier(classes, pool)
        twin.reset_classifier(classes, pool, rngs=nnx.Rngs(1))
        outlook_jax.load_weights(twin, outlook_torch.export_weights(model))
        ours, theirs = model(torch.from_numpy(images)).detach().numpy(), jax_logits(twin, last(images))
        assert ours.shape == (2, classes or config.num_features)
        assert relative_error(theirs, ours) <= FORWARD
        assert model.num_classes == twin.num_classes == classes
        assert not model.head.training
        assert model.config == twin.config


def test_parameter_groups_are_timms_in_both_twins() -> None:
    from timm.models._manipulate import group_with_matcher

    config = small_config()
    oracle, model = timm_volo(config, draw_weights(config)), outlook_torch.VOLO(config)
    twin = nnx.eval_shape(lambda: outlook_jax.VOLO(config, rngs=nnx.Rngs(0)))
    assert model.no_weight_decay() == twin.no_weight_decay() == oracle.no_weight_decay()
    truth = group_with_matcher(oracle.named_parameters(), oracle.group_matcher(), reverse=True)
    assert group_with_matcher(model.named_parameters(), model.group_matcher(), reverse=True) == truth
    names = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(twin, nnx.Param))]
    theirs = group_with_matcher([(name, name) for name in names], twin.group_matcher(), reverse=True)
    torch_names = {entry.flax: entry.torch for entry in table_for(config).entries}
    assert {torch_names[name]: group for name, group in theirs.items()} == truth
    assert len(set(truth.values())) > 8


def test_overrides_change_the_configuration_of_a_variant() -> None:
    sizes = {"layers": (1, 1, 1, 1), "num_classes": 4, "img_size": 32}
    expected = replace(VOLO_VARIANTS["volo_d1_224"].config, **sizes)
    assert outlook_torch.volo("volo_d1_224", **sizes).config == expected
    assert nnx.eval_shape(lambda: outlook_jax.volo("volo_d1_224", **sizes, rngs=nnx.Rngs(0))).config == expected
    assert expected.img_size == (32, 32)
    assert expected.embed_dims == (192, 384, 384, 384)


def test_timm_loads_the_weights_of_the_torch_twin_strictly() -> None:
    config = small_config()
    model = torch_volo(config, draw_weights(config))
    oracle = timm_volo(config, draw_weights(config, seed=1))
    oracle.load_state_dict(model.state_dict(), strict=True)
    for name, tensor in oracle.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
