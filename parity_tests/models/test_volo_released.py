"""The released models at full size, in float64: logits of all, gradients of D1. Slow: billions of products each."""

import gc

import numpy as np
import pytest
import torch
from flax import nnx

from outlook_common import VOLO_VARIANTS
from parity_tests.models.test_volo_forward import FORWARD, assert_steps_equal, jax_step, timm_step, torch_step
from parity_tests.support.runners import relative_error
from parity_tests.support.volo import draw_images, draw_weights, jax_volo, last, timm_volo, torch_volo

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "name", ["volo_d1_224", "volo_d1_384", "volo_d2_224", "volo_d3_224", "volo_d4_224", "volo_d5_224"]
)
def test_logits_of_both_twins_equal_timms_at_full_size(name: str) -> None:
    config = VOLO_VARIANTS[name].config
    weights, images = draw_weights(config), draw_images(config, batch=1)
    outputs = []
    for make in (timm_volo, torch_volo):
        with torch.no_grad():
            outputs.append(make(config, weights).eval()(torch.from_numpy(images)).numpy())
        gc.collect()  # D5 takes 2.4 GB
    run = nnx.jit(lambda twin, images: twin(images))
    outputs.append(np.asarray(run(jax_volo(config, weights, deterministic=True), last(images))))
    gc.collect()
    truth, ours, theirs = outputs
    assert truth.std() > 0.01
    assert relative_error(ours, truth) <= FORWARD
    assert relative_error(theirs, truth) <= FORWARD


def test_training_outputs_gradients_and_statistics_of_d1_equal_timms(monkeypatch: pytest.MonkeyPatch) -> None:
    config = VOLO_VARIANTS["volo_d1_224"].config
    weights, images = draw_weights(config), draw_images(config, batch=2)
    truth = timm_step(config, weights, images, monkeypatch)
    assert_steps_equal(torch_step(config, weights, images), truth)
    assert_steps_equal(jax_step(config, weights, images), truth)
