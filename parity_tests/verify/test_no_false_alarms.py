"""No false alarm: honest layers of random sizes pass in every precision, compiled as users compile them."""

from typing import Any

import numpy as np
import pytest

from outlook_parity import verify
from parity_tests.support.runners import layer_pair

HONEST_SEEDS = [
    pytest.param(seed, marks=[] if seed < 3 else pytest.mark.slow(reason="300 configurations take ten minutes"))
    for seed in range(300)
]


def draw(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def random_config(seed: int) -> tuple[dict[str, Any], tuple[int, ...]]:
    rng = np.random.default_rng(seed)
    heads, width = int(rng.integers(1, 5)), int(rng.integers(1, 9))
    kernel = tuple(int(k) for k in rng.choice([1, 3, 5], 2))
    sizes = {
        "dim": heads * width,
        "num_heads": heads,
        "kernel_size": kernel,
        "padding": tuple(k // 2 for k in kernel),
        "stride": tuple(int(s) for s in rng.integers(1, 4, 2)),
        "qkv_bias": bool(rng.integers(2)),
    }
    return sizes, (int(rng.integers(1, 4)), *(int(n) for n in rng.integers(1, 15, 2)), heads * width)


@pytest.mark.parametrize("seed", HONEST_SEEDS)
def test_honest_layers_pass_in_every_precision(seed: int) -> None:
    sizes, shape = random_config(seed)
    layers = layer_pair(**sizes, seed=seed, dtype="float32")
    # Module by module nothing is compiled as a whole, and each new shape's operations one by one: of every fourth.
    levels = ("forward", "gradients") if seed % 4 else ("forward", "layers", "gradients")
    dtypes = ("float64", "float32", "bfloat16")
    report = verify(*layers, draw(*shape, seed=seed), dtypes=dtypes, levels=levels, seed=seed)
    assert report.verdict == "pass", (sizes, shape, [row for row in report.checks if row.verdict == "mismatch"])


@pytest.mark.slow(reason="32 layers, trained in two dtypes each, take a minute")
def test_honest_layers_have_honest_losses() -> None:
    for seed in range(32):
        layers = layer_pair(12, num_heads=3, seed=seed, dtype="float32")
        report = verify(*layers, draw(2, 7, 7, 12, seed=seed), levels=("training",), dtypes=("float32",), seed=seed)
        assert report.verdict == "pass", (seed, [row for row in report.checks if row.verdict == "mismatch"])
