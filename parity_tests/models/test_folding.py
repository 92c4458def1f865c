"""VOLO for inference with the BatchNorm of its stem folded into the convolutions, in both twins."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flax import nnx

import outlook_jax
import outlook_torch
from outlook_jax.batch_norm import BatchNorm
from parity_tests.support.volo import draw_images, draw_weights, jax_logits, jax_volo, last, small_config, torch_volo

pytestmark = pytest.mark.usefixtures("quick_compilation")

TWINS = {"torch": outlook_torch, "jax": outlook_jax}
CONFIG = small_config()


def made(twin: str) -> Any:
    model = {"torch": torch_volo, "jax": jax_volo}[twin](CONFIG, draw_weights(CONFIG))
    model.eval()
    return model


def logits(model: Any, images: np.ndarray) -> np.ndarray:
    if isinstance(model, torch.nn.Module):
        with torch.no_grad():
            return model(torch.from_numpy(images)).numpy()
    return jax_logits(model, last(images))


@pytest.mark.parametrize("twin", TWINS)
def test_logits_are_the_same_to_rounding_without_any_batch_norm(twin: str) -> None:
    model, images = made(twin), draw_images(CONFIG)
    expected = logits(model, images)
    folded = TWINS[twin].fold_batch_norm(model)
    found = logits(folded, images)
    assert np.abs(found - expected).max() <= 1e-12 * np.abs(expected).max()
    assert not np.array_equal(found, expected)
    modules = folded.modules() if twin == "torch" else [module for _, module in nnx.iter_modules(folded)]
    assert not any(isinstance(module, torch.nn.BatchNorm2d | BatchNorm) for module in modules)
    np.testing.assert_array_equal(logits(model, images), expected)  # the model itself is as it was


def test_weights_outside_of_the_stem_are_shared_in_pytorch() -> None:
    model = made("torch")
    folded = outlook_torch.fold_batch_norm(model)
    ours, theirs = dict(model.named_parameters()), dict(folded.named_parameters())
    shared = [name for name in theirs if name in ours and theirs[name] is ours[name]]
    assert [name for name in ours if name not in shared] == [
        name for name in ours if name.startswith("patch_embed.conv")
    ]


@pytest.mark.unchecked
@pytest.mark.parametrize("twin", TWINS)
def test_a_model_in_training_mode_or_of_another_kind_is_refused(twin: str) -> None:
    model = made(twin)
    with pytest.raises(TypeError, match=r"^(Sequential|List) is not a VOLO of this package"):
        TWINS[twin].fold_batch_norm(model.patch_embed.conv)
    with pytest.raises(TypeError, match=r"^int is not a VOLO of this package"):
        TWINS[twin].fold_batch_norm(3)
    with pytest.raises(TypeError, match="is folded into its convolutions"):
        TWINS[twin].fold_batch_norm(TWINS[twin].fold_batch_norm(model))
    model.train()
    with pytest.raises(ValueError, match=r"training mode.*call model\.eval\(\)"):
        TWINS[twin].fold_batch_norm(model)


@pytest.mark.parametrize("twin", TWINS)
def test_a_folded_model_neither_loads_nor_saves_weights(twin: str, tmp_path: Path) -> None:
    folded = TWINS[twin].fold_batch_norm(made(twin))
    with pytest.raises(TypeError, match="use the model that was passed to fold_batch_norm"):
        TWINS[twin].load_weights(folded, draw_weights(CONFIG))
    with pytest.raises(TypeError, match="no weights of the released names"):
        TWINS[twin].save_weights(folded, tmp_path / "folded.safetensors")
    assert not list(tmp_path.iterdir())
