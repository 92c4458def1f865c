"""`verify` of a whole model, training steps included: an honest pair passes, planted bugs are called mismatches."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from outlook_common.weights import table_for
from outlook_parity import Report
from outlook_parity.backends.jax.runner import JaxRunner
from outlook_parity.backends.torch.runner import TorchRunner
from outlook_parity.core.optimizers import OPTIMIZERS
from outlook_parity.core.request import Request
from outlook_parity.core.task import mix_box
from outlook_parity.mapping.user import NameMap
from outlook_parity.pair import make_pair
from parity_tests.support.small_volo import CONFIG, check, quick_compilation, small_images, small_volo, wrong

__all__ = ["quick_compilation"]  # a fixture


@pytest.fixture(scope="module")
def computed() -> dict[Any, Any]:
    return {}


@pytest.fixture
def honest_jax(computed: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The JAX twin is the same each time, and is compiled once."""
    for method in ("run", "train"):
        compute = getattr(JaxRunner, method)

        def cached(self: Any, request: Any, method: str = method, compute: Any = compute, **how: Any) -> Any:
            key = method, request.dtype
            if key not in computed:
                computed[key] = compute(self, request, **how)
            return computed[key]

        monkeypatch.setattr(JaxRunner, method, cached)


@pytest.fixture
def honest(computed: dict[Any, Any], honest_jax: None) -> Report:
    if "report" not in computed:
        computed["report"] = check(small_volo(), "forward", "gradients", "training", dtypes=("float64", "float32"))
    return computed["report"]


def test_an_honest_model_passes_on_every_level(honest: Report) -> None:
    assert honest.verdict == "pass", [row for row in honest.checks if row.verdict == "mismatch"]


def test_every_parameter_and_buffer_and_the_losses_have_their_row_per_optimizer(honest: Report) -> None:
    names = [entry.torch for entry in table_for(CONFIG).entries]
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    for dtype in ("float64", "float32"):
        trained = {row.name for row in honest.checks if (row.level, row.dtype) == ("training", dtype)}
        parameters = [name for name in names if not name.endswith(buffers)]
        states = {"SGD": ["momentum"], "AdamW": ["first moment", "second moment"]}
        assert trained == {
            f"{optimizer}: {tensor}"
            for optimizer, kinds in states.items()
            for tensor in ["losses", *names, *(f"{kind} of {name}" for kind in kinds for name in parameters)]
        }
        graded = {row.name for row in honest.checks if (row.level, row.dtype) == ("gradients", dtype)}
        assert graded == {"input", *parameters}


def test_steps_move_every_weight_and_statistic_and_count_the_batches() -> None:
    images = small_images()
    twin = make_pair(*small_volo(), {"input": images}, NameMap()).torch
    before, after = (
        twin.weights(),
        twin.train(Request({"input": images}, "float64", "cpu", 0, "float64", steps=3)).tensors,
    )
    for name, start in before.items():
        for optimizer in OPTIMIZERS:
            end = after[f"{optimizer}: {name}"]
            if name.endswith("num_batches_tracked"):
                assert end == start + 3
            else:
                assert np.abs(end - start).max() > 1e-9, (optimizer, name)
    assert all(after[f"{optimizer}: losses"].shape == (3,) for optimizer in OPTIMIZERS)


def test_nothing_is_dropped_whatever_the_rates() -> None:
    rates = {"drop_rate": 0.5, "pos_drop_rate": 0.5, "attn_drop_rate": 0.5, "drop_path_rate": 0.5}
    assert wrong(check(small_volo(**rates), "training")) == []


def test_the_box_of_the_training_steps_mixes_a_part_of_any_map() -> None:
    for H in range(1, 40):
        for W in range(1, 40):
            y1, x1, y2, x2 = mix_box((H, W))
            assert 0 <= y1 < y2 <= H
            assert 0 <= x1 < x2 <= W
            assert (y2 - y1) * (x2 - x1) < H * W or H * W == 1 or min(H, W) == 1


def _with_noise(dtype: str, units: float, where: str) -> Callable[[Any], Any]:
    """One gradient of a twin errs in one entry, by so many units of rounding."""

    def make(honest: Any) -> Any:
        def run(self: Any, request: Any, **how: Any) -> Any:
            traced = honest(self, request, **how)
            if request.dtype == dtype:
                gradient = traced.gradients[where].copy()
                gradient.flat[0] += units * 2.0**-23 * np.abs(gradient).max()
                traced = replace(traced, gradients={**traced.gradients, where: gradient})
            return traced

        return run

    return make


@pytest.mark.parametrize(("moves", "verdict"), [(1e4, "pass"), (1.0, "mismatch")])
def test_a_gradient_that_jumps_is_excused_only_if_rounding_moves_the_truth_as_much(
    moves: float, verdict: str, honest_jax: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(JaxRunner, "run", _with_noise("float32", 1e4, "norm.bias")(JaxRunner.run))
    honest = TorchRunner.run

    def moved(self: Any, request: Any, **how: Any) -> Any:
        if not request.moved:
            return honest(self, request, **how)
        return _with_noise("float64", moves * np.sign(request.moved), "norm.bias")(honest)(
            self, replace(request, moved=0.0)
        )

    monkeypatch.setattr(TorchRunner, "run", moved)
    report = check(small_volo(), "forward", "gradients", dtypes=("float32",))
    assert report.verdict == verdict
    assert wrong(report) == ([] if verdict == "pass" else ["norm.bias"])


def test_moving_weights_and_images_by_rounding_moves_smooth_gradients_by_no_more() -> None:
    images = small_images()
    twin = make_pair(*small_volo(), {"input": images}, NameMap()).torch
    truth, up, down = (
        twin.run(Request({"input": images}, "float64", "cpu", 0, "float32", moved=moved)).gradients
        for moved in (0.0, 16.0, -16.0)
    )
    for name in ("head.weight", "norm.weight", "post_network.0.mlp.fc1.weight", "network.2.0.attn.qkv.weight"):
        moved = np.abs(up[name] - down[name]).max() / np.abs(truth[name]).max() / 2.0**-23
        assert 1 < moved < 2000, name
