"""`verify` itself: what passes, what never does, and that it leaves everything as it was."""

import json
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx

import outlook_jax
from outlook_parity import Check, Noise, Report
from outlook_parity import verify as verify_levels
from outlook_parity.compare import tensors as compare
from outlook_parity.compare.noise import noise_factor, noise_of, rms
from outlook_parity.core.check import EXCUSED
from parity_tests.support.runners import layer_pair

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Training steps have their own tests.
verify = partial(verify_levels, levels=("forward", "gradients"))


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def small_pair(**sizes: Any) -> tuple[torch.nn.Module, nnx.Module]:
    return layer_pair(**{"dim": 6, "num_heads": 2, "stride": 2, "dtype": "float32", "seed": 3, **sizes})


def test_float16_and_a_map_of_one_pixel_pass() -> None:
    assert verify(*small_pair(), draw(2, 1, 1, 6), dtypes=("float64", "float16")).verdict == "pass"


def test_every_level_dtype_and_tensor_has_its_row() -> None:
    report = verify(*small_pair(qkv_bias=True), draw(1, 5, 4, 6))
    tensors = [f"{module}.{leaf}" for module in ("v", "attn", "proj") for leaf in ("weight", "bias")]
    expected = {("weights", "as given", name) for name in tensors}
    expected |= {("again", "float64", f"{how}: output") for how in ("called twice", "other numbers", "half as large")}
    for dtype in ("float64", "float32"):
        expected |= {("forward", dtype, "output")}
        expected |= {("gradients", dtype, name) for name in ["input", *tensors]}
    assert {(row.level, row.dtype, row.name) for row in report.checks} == expected
    assert len(report.checks) == len(expected)


def test_gradients_that_are_zero_in_both_are_marked_and_do_not_count_as_evidence() -> None:
    report = verify(*small_pair(kernel_size=1, padding=0), draw(1, 5, 4, 6))
    assert report.verdict == "pass"
    zero = {(row.level, row.name) for row in report.checks if row.verdict == "zero"}
    assert zero == {("gradients", "attn.weight"), ("gradients", "attn.bias")}


def test_models_of_nothing_but_zeros_are_not_run() -> None:
    torch_layer, jax_layer = small_pair()
    with torch.no_grad():
        for parameter in torch_layer.parameters():
            parameter.zero_()
    state = nnx.state(jax_layer, nnx.Param)
    nnx.update(jax_layer, jax.tree.map(jax.numpy.zeros_like, state))
    report = verify(torch_layer, jax_layer, draw(1, 5, 4, 6))
    assert report.verdict == "not-run"
    assert "nothing but zeros" in str(report)


@pytest.mark.parametrize(
    ("inputs", "why"),
    [
        (draw(0, 5, 4, 6), "empty"),
        (np.full((1, 5, 4, 6), 0.7), "constant along axis 1"),
        (np.broadcast_to(draw(1, 5, 1, 6), (1, 5, 4, 6)), "constant along axis 2"),
        (np.zeros((1, 1, 1, 1)), "zero"),
        (np.where(np.arange(6) == 2, np.nan, draw(1, 5, 4, 6)), "20 NaN or Inf among 120"),
    ],
    ids=["empty", "constant", "constant rows", "zero", "NaN"],
)
def test_inputs_that_can_tell_nothing_are_not_run(inputs: np.ndarray, why: str) -> None:
    report = verify(*small_pair(), inputs)
    assert report.verdict == "not-run"
    assert why in str(report.reason)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_an_absent_device_is_not_run() -> None:
    report = verify(*small_pair(), draw(1, 5, 4, 6), device="gpu")
    assert (report.verdict, report.checks) == ("not-run", ())
    assert "no gpu" in str(report.reason)


def test_training_steps_of_the_layer_pass_in_every_precision() -> None:
    dtypes = ("float64", "float32", "bfloat16")
    report = verify(*small_pair(), draw(2, 5, 4, 6), levels=("training",), dtypes=dtypes, steps=3)
    assert report.verdict == "pass", [row for row in report.checks if row.verdict == "mismatch"]
    assert {(row.level, row.dtype) for row in report.checks} == {
        ("weights", "as given"),
        *(("training", dtype) for dtype in dtypes),
    }


def one_after_the_other(numbers: np.ndarray) -> np.float32:
    total = np.float32(0)
    for number in numbers.astype(np.float32):
        total += number
    return total


@pytest.mark.parametrize(("off_by", "verdict"), [(0.0, "pass"), (3e-5, "mismatch")])
def test_a_loss_may_be_added_up_in_any_order_and_no_more(off_by: float, verdict: str) -> None:
    """XLA adds up one after the other, PyTorch in pairs: a loss is a few numbers, and one twin may round luckily."""
    for seed in range(100):
        squares = (draw(3, 1176, seed=seed) ** 2).astype(np.float32)
        truth = squares.astype(np.float64).mean(axis=1)
        in_order = np.array([one_after_the_other(row) / np.float32(1176) for row in squares], np.float64)
        traced = {
            "torch": {"SGD: losses": squares.mean(axis=1, dtype=np.float32).astype(np.float64)},
            "jax": {"SGD: losses": in_order * (1 + off_by)},
            "truth": {"SGD: losses": truth},
        }
        (row,) = compare.compare_level("training", "float32", traced, (98, 1176))
        assert row.verdict == verdict, (seed, row)


def test_training_happens_in_the_dtypes_asked_for_alone() -> None:
    levels = ("forward", "gradients", "training")
    report = verify(*small_pair(), draw(2, 5, 4, 6), levels=levels, training_dtypes=("float64",))
    assert report.verdict == "pass"
    assert {row.dtype for row in report.checks if row.level == "training"} == {"float64"}
    assert {row.dtype for row in report.checks if row.level == "forward"} == {"float64", "float32"}


@pytest.mark.parametrize(
    "asked",
    [
        {"levels": ()},
        {"levels": ("backward",)},
        {"dtypes": ()},
        {"dtypes": ("float8",)},
        {"training_dtypes": ("float16",)},
        {"device": "npu"},
    ],
)
def test_an_unknown_or_empty_request_is_an_error(asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"float64|forward|cpu"):
        verify(*small_pair(), draw(1, 5, 4, 6), **asked)


def test_inputs_that_are_no_floating_point_numbers_are_an_error_of_a_model_that_takes_none() -> None:
    with pytest.raises(TypeError, match="floating-point numbers, got input of int64"):
        verify(*small_pair(), np.arange(120).reshape(1, 5, 4, 6))
    with pytest.raises(TypeError, match=r"input must be floating-point numbers .* got <U1"):
        verify(*small_pair(), np.array(["a", "b"]))


def test_a_layer_told_to_compute_in_another_dtype_is_verified_in_the_one_asked_for() -> None:
    torch_layer, _ = small_pair()
    jax_layer = outlook_jax.OutlookAttention(6, 2, stride=2, dtype="bfloat16", rngs=nnx.Rngs(0))
    outlook_jax.load_weights(jax_layer, {k: v.numpy() for k, v in torch_layer.state_dict().items()})
    assert verify(torch_layer, jax_layer, draw(1, 5, 4, 6)).verdict == "pass"
    assert jax_layer.v.dtype == "bfloat16"


def test_an_answer_in_another_dtype_than_asked_for_is_a_mismatch() -> None:
    """In float64 a cast to float32 is lifted."""
    torch_layer, jax_layer = small_pair()
    torch_layer.__class__ = type("Rounding", (type(torch_layer),), {"forward": lambda self, x: _rounded(self, x)})
    report = verify(torch_layer, jax_layer, draw(1, 5, 4, 6), levels=("forward",), dtypes=("float64", "bfloat16"))
    wrong = [row for row in report.checks if row.verdict == "mismatch" and row.note]
    assert [(row.dtype, row.name, row.note) for row in wrong] == [
        ("bfloat16", "dtype of torch", "the output is float32")
    ]


def _rounded(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return super(type(layer), layer).forward(x).float()


def _settings() -> dict[str, Any]:
    backends = torch.backends
    return {
        "x64": jax.config.jax_enable_x64,
        "precision": jax.config.jax_default_matmul_precision,
        "device": jax.config.jax_default_device,
        "debug_nans": jax.config.jax_debug_nans,
        "tf32": [backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32],
        "new tf32": [o.fp32_precision for o in (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul)],
        "deterministic": torch.get_deterministic_debug_mode(),
        "grad": torch.is_grad_enabled(),
    }


def test_models_modes_and_global_settings_stay_as_they_were() -> None:
    torch_layer, jax_layer = small_pair()
    torch_layer.train()
    jax_layer.train()
    before = {name: tensor.clone() for name, tensor in torch_layer.state_dict().items()}
    jax_before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(jax_layer, nnx.Param)))
    torch_layer.proj.requires_grad_(False)
    settings = _settings()

    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert verify(torch_layer, jax_layer, draw(1, 5, 4, 6)).verdict == "pass"

    assert _settings() == settings
    assert torch_layer.training
    assert all(module.training for module in torch_layer.modules())
    assert not jax_layer.attn_drop.deterministic
    assert not torch_layer.proj.weight.requires_grad
    assert torch_layer.v.weight.grad is None
    for name, tensor in torch_layer.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name])
    jax_after = nnx.to_pure_dict(nnx.state(jax_layer, nnx.Param))
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), jax_before, jax_after))


def test_the_report_is_json_that_a_strict_parser_reads() -> None:
    torch_layer, jax_layer = small_pair()
    with torch.no_grad():
        torch_layer.attn.bias[1] = np.inf
    report = verify(torch_layer, jax_layer, draw(1, 5, 4, 6))
    parsed = json.loads(report.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert parsed["verdict"] == "mismatch"
    assert parsed["first_divergence"] == "attn"
    assert parsed["cause"] == "weight attn.bias: 1 NaN or Inf in torch"
    assert len(parsed["checks"]) == len(report.checks)
    assert parsed["environment"]["torch"] == torch.__version__
    assert parsed["environment"]["torch device"] == "cpu"


def row(level: str, dtype: str, verdict: str, name: str = "output") -> Check:
    return Check(level, dtype, name, verdict, bound=1.0)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([("forward", "float64", "pass")], "pass"),
        ([], "not-run"),
        ([("forward", "float32", "pass")], "not-run"),
        ([("forward", "float64", "zero")], "not-run"),
        ([("forward", "float64", "pass"), ("forward", "float64", "zero")], "pass"),
        ([("forward", "float64", "pass"), ("forward", "float64", "not-run")], "not-run"),
        ([("forward", "float64", "pass"), ("weights", "as given", "mismatch")], "mismatch"),
        ([("forward", "float64", "not-run"), ("forward", "float64", "mismatch")], "mismatch"),
    ],
)
def test_only_a_complete_comparison_of_something_passes(rows: list[tuple[str, str, str]], expected: str) -> None:
    assert compare.judge([row(*r) for r in rows], [("forward", "float64")])[0] == expected


def test_a_pair_with_another_shape_or_no_elements_never_passes() -> None:
    good = draw(3, 4)
    for torch_array, jax_array, verdict in [
        (good, good, "pass"),
        (good, good[:2], "mismatch"),
        (good, good[None], "mismatch"),
        (good[:0], good[:0], "not-run"),
    ]:
        traced = {"torch": {"output": torch_array}, "jax": {"output": jax_array}}
        assert compare.compare_level("forward", "float64", traced, (2, 6))[0].verdict == verdict


def test_what_rounding_alone_can_make_of_a_gradient_that_is_zero_is_excused_and_says_so() -> None:
    """Both twins have nothing but rounding, and two moved truths differ by as much."""
    traced = {twin: {"k.bias": 1e-18 * draw(5, seed=n)} for n, twin in enumerate(("torch", "jax", "up", "down"))}
    (excused,) = compare.compare_level("gradients", "float64", traced, (1, 5))
    assert (excused.verdict, excused.excused, excused.note) == ("pass", True, EXCUSED)
    assert excused.measured is not None
    assert excused.measured > excused.bound
    (other,) = compare.compare_level("gradients", "float64", {t: traced[t] for t in ("torch", "jax")}, (1, 5))
    assert (other.verdict, other.excused) == ("mismatch", False)


def test_noise_is_counted_in_units_of_rounding() -> None:
    truth = draw(100, 100)
    rounded = truth.astype(np.float32).astype(np.float64)
    noise = noise_of(rounded, truth, "float32")
    assert 0.1 < noise.rms < 0.5
    assert noise_of(truth + 3 * 2.0**-23 * rms(truth), truth, "float32").rms == pytest.approx(3)


def test_lucky_rounding_is_no_difference_but_a_large_factor_is() -> None:
    assert noise_factor(Noise(0.001, 0.0), Noise(0.9, 0.99)) == 1.0
    assert noise_factor(Noise(2.0, 30.0), Noise(2.0, 3.0)) == 10.0
    assert noise_factor(Noise(2.0, 3.0), Noise(10.0, 3.0)) == 5.0


def test_a_report_says_its_verdict_in_words() -> None:
    assert str(Report("not-run", reason="no gpu")) == "NOT RUN: no gpu"
    assert str(Report("mismatch", (row("forward", "float64", "mismatch"),))) == "MISMATCH: 1 of 1 checks differ"
