"""`examples/segmentation.py`: both twins from one start, and what its two heads share."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from examples import segmentation
from examples.segmentation import CLASSES, bilinear, mean_iou, pooling, run, segmenters, shapes
from outlook_common.config import check_image_size
from parity_tests.support.runners import relative_error
from parity_tests.support.volo import jit

pytestmark = pytest.mark.usefixtures("quick_compilation")

# One pixel short of two strides, and one beyond.
SIZE = (31, 17)
CONFIG = replace(segmentation.CONFIG, img_size=(32, 24), stem_hidden_dim=4, embed_dims=(8, 16, 16, 16))


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmentation, "BATCH", 3)
    monkeypatch.setattr(segmentation, "HEAD_DIM", 6)


def test_both_twins_train_alike_at_a_size_that_the_strides_do_not_divide() -> None:
    with pytest.raises(ValueError, match="31x17 pixels do not fit"):
        check_image_size(SIZE, CONFIG.stride)
    of_torch, of_jax = run(4, 6, CONFIG, SIZE)
    losses = np.array(of_torch.losses)
    assert len(set(losses)) == 4
    assert np.abs(losses - of_jax.losses).max() <= 1e-9 * losses.max()
    assert of_torch.miou == of_jax.miou
    assert 0 < of_torch.miou < 1


def test_scores_and_their_gradients_are_the_same_and_reach_every_weight() -> None:
    torch_model, jax_model = segmenters(CONFIG)
    images, _ = shapes(2, 3, SIZE)
    scores = torch_model(torch.from_numpy(images.transpose(0, 3, 1, 2)))
    assert scores.shape == (2, len(CLASSES), *SIZE)
    theirs = jit(lambda model, x: model(x))(jax_model, jnp.asarray(images))
    assert relative_error(np.asarray(theirs), scores.detach().permute(0, 2, 3, 1).numpy()) <= 1e-12
    scores.square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in torch_model.parameters())
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(jax_model, nnx.Param)))
    assert count == sum(parameter.numel() for parameter in torch_model.parameters())


@pytest.mark.parametrize(("size", "new_size"), [(13, 26), (10, 10), (1, 7), (3, 13), (2, 11), (26, 104)])
def test_resampling_is_pytorchs(size: int, new_size: int) -> None:
    x = np.random.default_rng(0).standard_normal((1, 1, size))
    expected = torch.nn.functional.interpolate(torch.from_numpy(x), new_size, mode="linear", align_corners=False)
    assert relative_error(x @ bilinear(size, new_size).T, expected.numpy()) <= 1e-12
    x = np.random.default_rng(0).standard_normal((1, 1, new_size))
    pooled = torch.nn.functional.adaptive_avg_pool1d(torch.from_numpy(x), size)
    assert relative_error(x @ pooling(new_size, size).T, pooled.numpy()) <= 1e-12


def test_the_images_are_seeded_and_have_every_class() -> None:
    data, again, other = shapes(8, 1), shapes(8, 1), shapes(8, 2)
    assert np.array_equal(data.images, again.images)
    assert not np.array_equal(data.labels, other.labels)
    assert set(np.unique(data.labels)) == set(range(len(CLASSES)))


def test_the_mean_iou_by_hand() -> None:
    labels, predicted = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 0])
    assert mean_iou(predicted, labels) == pytest.approx((1 / 3 + 2 / 3 + 0) / 3)
    assert mean_iou(labels, labels) == 1.0
