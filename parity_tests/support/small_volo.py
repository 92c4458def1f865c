"""A small VOLO in both twins with the same weights, and quick compilation, for the tests of the verifier."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import outlook_jax
import outlook_torch
from outlook_common import VOLOConfig
from outlook_parity import Report, verify
from outlook_parity.models.builtin import draw_weights

Models = tuple[outlook_torch.VOLO, outlook_jax.VOLO]

CONFIG = VOLOConfig(
    layers=(1, 2),
    img_size=32,
    patch_size=4,
    num_classes=5,
    stem_hidden_dim=4,
    embed_dims=(8, 16),
    num_heads=(2, 4),
    downsamples=(True, False),
    outlook_attention=(True, False),
    post_layers=("ca",),
    qkv_bias=True,
)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation() -> Iterator[None]:
    """Compilation for speed would take most of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def small_volo(*, scan_layers: bool = False, **rates: float) -> Models:
    """Return both twins; unscanned unless asked: a compiled loop is kept between tests, and with it the honest code."""
    config, weights = replace(CONFIG, **rates), draw_weights(CONFIG, 1)
    torch_model = outlook_torch.VOLO(config)
    jax_model = outlook_jax.VOLO(config, scan_layers=scan_layers, rngs=nnx.Rngs(0))
    outlook_torch.load_weights(torch_model, weights)
    outlook_jax.load_weights(jax_model, weights)
    return torch_model, jax_model


def small_images(size: int = 32) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((2, size, size, 3))


def check(models: Models, *levels: str, dtypes: tuple[str, ...] = ("float64",), **options: Any) -> Report:
    return verify(*models, small_images(), levels=levels, dtypes=dtypes, steps=2, **options)


def wrong(report: Report) -> list[str]:
    return [row.name for row in report.checks if row.verdict == "mismatch"]
