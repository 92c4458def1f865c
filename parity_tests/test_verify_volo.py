"""`verify` of a whole model, training steps included: an honest pair passes, planted bugs are called mismatches."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from flax import nnx

import outlook_jax
import outlook_jax.batch_norm
import outlook_jax.blocks
import outlook_torch
import outlook_torch.blocks
from outlook_common.weights import table_for
from outlook_parity import Report
from outlook_parity.jax_twin import JaxTwin
from outlook_parity.names import Given
from outlook_parity.optimizers import BETAS, EPSILON, LEARNING_RATE, OPTIMIZERS, WEIGHT_DECAY
from outlook_parity.pair import make_pair
from outlook_parity.request import Request
from outlook_parity.subjects import mix_box
from outlook_parity.torch_twin import TorchTwin
from parity_tests.small_twins import CONFIG, Models, check, quick_compilation, small_images, small_volo, wrong

__all__ = ["quick_compilation"]  # a fixture

Plant = Callable[[Models, pytest.MonkeyPatch], None]

TORCH, JAX = outlook_torch.blocks, outlook_jax.blocks


@pytest.fixture(scope="module")
def computed() -> dict[Any, Any]:
    return {}


@pytest.fixture
def honest_jax(computed: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The JAX twin is the same each time, and is compiled once."""
    for method in ("run", "train"):
        compute = getattr(JaxTwin, method)

        def cached(self: Any, request: Any, method: str = method, compute: Any = compute, **how: Any) -> Any:
            key = method, request.dtype
            if key not in computed:
                computed[key] = compute(self, request)
            return computed[key]

        monkeypatch.setattr(JaxTwin, method, cached)


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
    twin = make_pair(*small_volo(), images, Given()).torch
    before, after = twin.weights(), twin.train(Request(images, "float64", "cpu", 0, "float64", steps=3)).tensors
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


def _in_modules(kind: type, change: Callable[[Any], None], twin: int) -> Plant:
    def plant(models: Models, patch: pytest.MonkeyPatch) -> None:
        modules = models[0].modules() if twin == 0 else [module for _, module in nnx.iter_modules(models[1])]
        found = [module for module in modules if isinstance(module, kind)]
        assert found
        for module in found:
            change(module)

    return plant


def _method(owner: type, name: str, make: Callable[[Any], Any]) -> Plant:
    return lambda models, patch: patch.setattr(owner, name, make(getattr(owner, name)))


def _optimizer(name: str, **twin: Any) -> Plant:
    return lambda models, patch: patch.setitem(OPTIMIZERS, name, replace(OPTIMIZERS[name], **twin))


def _pos_embed_later(honest: Any) -> Any:
    """Added behind the part that it belongs before."""

    def forward(self: Any, index: int, x: Any) -> Any:
        if index != 2:
            return honest(self, index, x)
        return self._run_blocks(self.network[2], x) + self._pos_embed(x.shape[1:3])

    return forward


def _queries_for_keys(honest: Any) -> Any:
    # The class token's one query has another shape than its keys, and is left alone.
    return lambda q, k, v, *rest: honest(k, q, v, *rest) if q.shape == k.shape else honest(q, k, v, *rest)


def _no_aux(self: Any, x: Any, pre_logits: bool = False) -> Any:
    return self.head(self._pool(x))


def _mean_of_aux_torch(self: Any, x: Any, pre_logits: bool = False) -> Any:
    return self.head(self._pool(x)) + 0.5 * self.aux_head(x[:, 1:]).mean(dim=1)


def _mean_of_aux_jax(self: Any, x: Any, pre_logits: bool = False) -> Any:
    return self.head(self._pool(x)) + 0.5 * self.aux_head(x[:, 1:]).mean(axis=1)


def _biased_torch(honest: Any) -> Any:
    """The running variance moves towards the batch's biased variance, as Flax's own layer's does."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        before, out = self.running_var.clone(), honest(self, x)
        values = x.numel() // x.shape[1]
        if self.training:
            batch = (self.running_var - (1 - self.momentum) * before) * (values - 1) / values
            self.running_var = (1 - self.momentum) * before + batch  # not in place: the backward pass needs the old one
        return out

    return forward


def _biased_jax(honest: Any) -> Any:
    def statistics(self: Any, x: jax.Array) -> Any:
        before, out = self.var[...], honest(self, x)
        values = x.size // x.shape[-1]
        batch = (self.var[...] - (1 - self.momentum) * before) * (values - 1) / values
        self.var[...] = (1 - self.momentum) * before + batch
        return out

    return statistics


def _stale_torch(honest: Any) -> Any:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return honest(self, x)
        self.num_batches_tracked += 1
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)

    return forward


def _stale_jax(honest: Any) -> Any:
    def statistics(self: Any, x: jax.Array) -> Any:
        mean, var = self.mean[...], self.var[...]
        out = honest(self, x)
        self.mean[...], self.var[...] = mean, var
        return out

    return statistics


def _tanh_torch(honest: Any) -> Any:
    return lambda self, x: self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def _tanh_jax(honest: Any) -> Any:
    return lambda self, x: self.fc2(jax.nn.gelu(self.fc1(x), approximate=True))


def _set(name: str, value: Any) -> Callable[[Any], None]:
    return lambda module: setattr(module, name, value)


def _instead(function: Any) -> Callable[[Any], Any]:
    return lambda honest: function


@dataclass(frozen=True)
class Fault:
    name: str
    level: str
    plant: tuple[Plant, Plant]  # in the torch twin, in the JAX twin


BATCH_NORM = (torch.nn.BatchNorm2d, outlook_jax.batch_norm.BatchNorm)


def _of_functions(name: str, make: Callable[[Any], Any]) -> tuple[Plant, Plant]:
    return tuple(
        lambda models, patch, owner=owner: patch.setattr(owner, name, make(getattr(owner, name)))
        for owner in (TORCH, JAX)
    )


def _of_volo(name: str, torch_make: Callable[[Any], Any], jax_make: Callable[[Any], Any]) -> tuple[Plant, Plant]:
    return _method(outlook_torch.VOLO, name, torch_make), _method(outlook_jax.VOLO, name, jax_make)


FAULTS = [
    Fault(
        "epsilon of LayerNorm 1e-6",
        "forward",
        (
            _in_modules(torch.nn.LayerNorm, _set("eps", 1e-6), 0),
            _in_modules(nnx.LayerNorm, _set("epsilon", 1e-6), 1),
        ),
    ),
    Fault(
        "tanh GELU", "forward", (_method(TORCH.Mlp, "forward", _tanh_torch), _method(JAX.Mlp, "__call__", _tanh_jax))
    ),
    Fault("auxiliary head dropped", "forward", _of_volo("forward_head", _instead(_no_aux), _instead(_no_aux))),
    Fault(
        "mean of the auxiliary head",
        "forward",
        _of_volo("forward_head", _instead(_mean_of_aux_torch), _instead(_mean_of_aux_jax)),
    ),
    Fault("pos_embed behind the part", "forward", _of_volo("_forward_part", _pos_embed_later, _pos_embed_later)),
    Fault("queries and keys exchanged", "forward", _of_functions("attend", _queries_for_keys)),
    Fault(
        "biased running variance",
        "training",
        (_method(BATCH_NORM[0], "forward", _biased_torch), _method(BATCH_NORM[1], "_batch_statistics", _biased_jax)),
    ),
    Fault(
        "momentum of BatchNorm 0.9",
        "training",
        (_in_modules(BATCH_NORM[0], _set("momentum", 0.9), 0), _in_modules(BATCH_NORM[1], _set("momentum", 0.9), 1)),
    ),
    Fault(
        "stale statistics",
        "training",
        (_method(BATCH_NORM[0], "forward", _stale_torch), _method(BATCH_NORM[1], "_batch_statistics", _stale_jax)),
    ),
    Fault(
        "weight decay as L2",
        "training",
        (
            _optimizer("AdamW", torch=lambda p: torch.optim.Adam(p, LEARNING_RATE, BETAS, EPSILON, WEIGHT_DECAY)),
            _optimizer(
                "AdamW",
                jax=lambda: optax.chain(
                    optax.add_decayed_weights(WEIGHT_DECAY), optax.adam(LEARNING_RATE, *BETAS, eps=EPSILON)
                ),
            ),
        ),
    ),
    Fault(
        "no momentum",
        "training",
        (
            _optimizer("SGD", torch=lambda p: torch.optim.SGD(p, LEARNING_RATE)),
            _optimizer("SGD", jax=lambda: optax.sgd(LEARNING_RATE)),
        ),
    ),
]
BUFFERS_ONLY = ("biased running variance", "momentum of BatchNorm 0.9", "stale statistics")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_in_the_torch_twin_is_called_a_mismatch(
    fault: Fault, monkeypatch: pytest.MonkeyPatch, honest_jax: None
) -> None:
    models = small_volo()
    fault.plant[0](models, monkeypatch)
    _assert_seen(fault, check(models, fault.level))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_in_the_jax_twin_is_called_a_mismatch(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    models = small_volo()
    fault.plant[1](models, monkeypatch)
    _assert_seen(fault, check(models, fault.level))


def _assert_seen(fault: Fault, report: Report) -> None:
    assert report.verdict == "mismatch"
    if fault.name in BUFFERS_ONLY:
        assert all(name.endswith(("running_mean", "running_var")) for name in wrong(report))
    if fault.level == "training":
        optimizers = {"weight decay as L2": {"AdamW"}, "no momentum": {"SGD"}}.get(fault.name, {"SGD", "AdamW"})
        assert {name.partition(":")[0] for name in wrong(report)} == optimizers


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
    monkeypatch.setattr(JaxTwin, "run", _with_noise("float32", 1e4, "norm.bias")(JaxTwin.run))
    honest = TorchTwin.run

    def moved(self: Any, request: Any, **how: Any) -> Any:
        if not request.moved:
            return honest(self, request, **how)
        return _with_noise("float64", moves * np.sign(request.moved), "norm.bias")(honest)(
            self, replace(request, moved=0.0)
        )

    monkeypatch.setattr(TorchTwin, "run", moved)
    report = check(small_volo(), "forward", "gradients", dtypes=("float32",))
    assert report.verdict == verdict
    assert wrong(report) == ([] if verdict == "pass" else ["norm.bias"])


def test_moving_weights_and_images_by_rounding_moves_smooth_gradients_by_no_more() -> None:
    images = small_images()
    twin = make_pair(*small_volo(), images, Given()).torch
    truth, up, down = (
        twin.run(Request(images, "float64", "cpu", 0, "float32", moved=moved)).gradients for moved in (0.0, 16.0, -16.0)
    )
    for name in ("head.weight", "norm.weight", "post_network.0.mlp.fc1.weight", "network.2.0.attn.qkv.weight"):
        moved = np.abs(up[name] - down[name]).max() / np.abs(truth[name]).max() / 2.0**-23
        assert 1 < moved < 2000, name
