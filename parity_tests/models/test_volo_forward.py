"""VOLO in evaluation: both twins against timm, image sizes, dtypes, export."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

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
    last,
    small_config,
    timm_volo,
    torch_volo,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

FORWARD = 1e-12

NO_DOWNSAMPLING: dict[str, Any] = {
    "layers": (1, 1, 2),
    "embed_dims": (12, 12, 12),
    "num_heads": (2, 3, 2),
    "downsamples": (False, False, False),
    "pooling_scale": 1,
}


CONFIGS: dict[str, dict[str, Any]] = {
    "four_stages": FOUR_STAGES,
    "value_biases_ratios_per_stage_rectangular_images_of_4_channels": {
        "qkv_bias": True,
        "mlp_ratio": (1, 2.5),
        "img_size": (16, 40),
        "in_chans": 4,
    },
    "average_pooling_without_class_token": {"global_pool": "avg", "use_aux_head": False, "post_layers": None},
    "average_pooling_of_the_class_token_too": {"global_pool": "avg", "outlook_attention": (False, False)},
    "no_classes_and_no_pooling": {"num_classes": 0, "global_pool": ""},
    "maps_that_the_stride_of_the_windows_does_not_divide": NO_DOWNSAMPLING
    | {"outlook_attention": (True, True, False), "img_size": (24, 40), "patch_size": 8, "use_aux_head": False},
}


@pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_of_both_twins_equal_timms(overrides: dict[str, Any]) -> None:
    config = small_config(**overrides)
    weights, images = draw_weights(config), draw_images(config)
    with torch.no_grad():
        truth = timm_volo(config, weights).eval()(torch.from_numpy(images)).numpy()
        ours = torch_volo(config, weights).eval()(torch.from_numpy(images)).numpy()
    theirs = jax_logits(jax_volo(config, weights, deterministic=True), last(images))
    assert relative_error(ours, truth) <= FORWARD
    assert relative_error(theirs, truth) <= FORWARD


def test_paths_and_shapes_of_the_jax_state_are_the_tables() -> None:
    name = "volo_d1_384"
    abstract = nnx.eval_shape(lambda: outlook_jax.volo(name, rngs=nnx.Rngs(0)))
    state = {
        ".".join(map(str, path)): variable.shape
        for path, variable in nnx.to_flat_state(nnx.state(abstract, (nnx.Param, nnx.BatchStat)))
    }
    entries = table_for(VOLO_VARIANTS[name].config).entries
    assert state == {entry.flax: entry.flax_shape for entry in entries}
    assert "network.0.0.attn.v.kernel" in state


def test_any_image_size_with_pos_embed_resized_at_each_call() -> None:
    config = small_config(dynamic_img_size=True)
    weights, size = draw_weights(config), (24, 48)
    images = draw_images(config, size=size)
    grid = torch.from_numpy(weights["pos_embed"]).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(grid, size=(3, 6), mode="bicubic").permute(0, 2, 3, 1).numpy()
    fixed = replace(config, img_size=size, dynamic_img_size=False)
    with torch.no_grad():
        truth = timm_volo(fixed, weights | {"pos_embed": resized}).eval()(torch.from_numpy(images)).numpy()
        ours = torch_volo(config, weights).eval()(torch.from_numpy(images)).numpy()
    theirs = jax_logits(jax_volo(config, weights, deterministic=True), last(images))
    assert relative_error(ours, truth) <= FORWARD
    assert relative_error(theirs, truth) <= FORWARD


@pytest.mark.unchecked  # a symbol is no int
def test_the_jax_twin_is_exported_for_any_batch() -> None:
    config = small_config()
    twin = jax_volo(config, draw_weights(config), deterministic=True)
    (batch,) = jax.export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, 32, 32, 3), jnp.float64)
    exported = jax.export.export(jax.jit(lambda images: twin(images)))(shape)
    for size in (1, 5):
        images = last(draw_images(config, batch=size))
        assert relative_error(np.asarray(exported.call(images)), jax_logits(twin, images)) <= FORWARD


def test_bfloat16_computation_with_float32_parameters_errs_alike_in_both_twins() -> None:
    config = small_config()
    weights = {name: array.astype(np.float32).astype(array.dtype) for name, array in draw_weights(config).items()}
    images = draw_images(config, batch=8).astype(np.float32)
    with torch.no_grad():
        truth = torch_volo(config, weights).eval()(torch.from_numpy(images).double()).numpy()
        model = torch_volo(config, weights).eval().float()
        with torch.autocast("cpu", torch.bfloat16):
            ours = model(torch.from_numpy(images))
    twin = jax_volo(config, weights, param_dtype="float32", dtype="bfloat16", deterministic=True)
    theirs = jax_logits(twin, last(images))
    assert ours.dtype == torch.bfloat16
    assert theirs.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(twin, nnx.Param)))
    errors = [
        np.sqrt(np.mean((np.asarray(out, np.float64) - truth) ** 2)) / np.sqrt(np.mean(truth**2))
        for out in (ours.double().numpy(), theirs.astype(jnp.float64))
    ]
    assert 2**-9 < max(errors) < 0.1
    assert max(errors) < 4 * min(errors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_cast_as_a_whole_computes_in_that_dtype(dtype: str) -> None:
    config = small_config(layers=(1, 1))
    images = draw_images(config)
    model = outlook_torch.VOLO(config, dtype=getattr(torch, dtype)).eval()
    twin = nnx.eval_shape(lambda: outlook_jax.VOLO(config, param_dtype=dtype, deterministic=True, rngs=nnx.Rngs(0)))
    assert model(torch.from_numpy(images).to(getattr(torch, dtype))).dtype == getattr(torch, dtype)
    assert nnx.eval_shape(lambda twin, x: twin(x), twin, jnp.asarray(last(images), dtype)).dtype == dtype
