"""TF32 as a precision of its own: judged on emulated devices that have it, and not run where none has."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
import torch
from flax import nnx
from typer.testing import CliRunner, Result

import outlook_jax
from outlook_parity import Check, Noise, Report, verify
from outlook_parity.backends.jax.settings import jax_products_absence
from outlook_parity.backends.jax.settings import pinned as jax_pinned
from outlook_parity.backends.torch.settings import pinned as torch_pinned
from outlook_parity.backends.torch.settings import torch_products_absence
from outlook_parity.cli.app import app
from outlook_parity.compare import tensors as compare
from outlook_parity.compare.noise import rms
from outlook_parity.core.precision import PRECISIONS, absence_of_products
from outlook_parity.diagnose.precision import as_coarse_as
from outlook_parity.trace.file import read, write
from parity_tests.faults.test_attention import FAULTS, pair
from parity_tests.support.small_volo import quick_compilation, small_images, small_volo
from parity_tests.support.tf32_emulation import tf32_devices
from parity_tests.verify.test_report import SCHEMA

__all__ = ["quick_compilation"]  # a fixture

ABSENT = "JAX on cpu has no tf32: a product errs by"


@pytest.fixture(scope="module")
def with_tf32(quick_compilation: None) -> Iterator[None]:
    """The tests that take this stand together, so that it is made once."""
    with tf32_devices():
        yield


def draw(*shape: int, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def check(layers: tuple[Any, Any], *dtypes: str, levels: tuple[str, ...] = ("forward", "layers")) -> Report:
    return verify(*layers, draw(2, 7, 9, 12), levels=levels, dtypes=dtypes)


def wrong(report: Report) -> list[Check]:
    return [row for row in report.checks if row.verdict == "mismatch"]


# Without TF32.


def test_where_no_device_has_tf32_it_is_not_run_and_the_rest_is() -> None:
    report = check(pair({}), "float64", "tf32", "tf32", levels=("forward", "gradients"))
    assert report.verdict == "not-run"
    assert [row.level for row in report.checks if row.verdict == "not-run"] == ["forward", "gradients"]
    assert str(report.reason).startswith(ABSENT)
    rows = {(row.level, row.dtype): row for row in report.checks}
    for level in ("forward", "gradients"):
        assert rows[level, "tf32"].verdict == "not-run"
        assert rows[level, "tf32"].note.startswith(ABSENT)
        assert rows[level, "float64"].verdict == "pass"
    jsonschema.validate(json.loads(report.to_json()), SCHEMA)


def test_a_mismatch_elsewhere_is_one_where_tf32_is_not_run() -> None:
    layers = pair({})
    with torch.no_grad():
        layers[0].v.weight.mul_(2)
    assert check(layers, "float64", "tf32", levels=("forward",)).verdict == "mismatch"


def outlook(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)


def test_the_command_line_says_that_there_is_no_tf32_and_returns_3(tmp_path: Path) -> None:
    verified = outlook("verify", "--model", "layer", "--dtype", "tf32", "--level", "forward")
    assert verified.exit_code == 3
    assert verified.output.strip().splitlines()[-1].startswith(f"NOT RUN: {ABSENT}")
    out = tmp_path / "a.trace"
    for framework in ("torch", "jax"):
        traced = outlook("trace", "--framework", framework, "--model", "layer", "--dtype", "tf32", "--out", out)
        assert traced.exit_code == 3
        assert "has no tf32" in traced.output
        assert not out.exists()


@pytest.mark.parametrize(
    ("bits", "there"),
    [(23, False), (15, False), (10, True), (7, False)],
    ids=["full", "bfloat16 x 3", "tf32", "bfloat16"],
)
def test_whether_there_is_tf32_is_told_by_a_product(bits: int, there: bool) -> None:
    def multiply(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return np.matmul(*(np.asarray(jax.lax.reduce_precision(x, 8, bits)) for x in (one, other)))

    assert (absence_of_products("here", "tf32", multiply) is None) is there
    assert absence_of_products("here", "float32", multiply) is None


def settings() -> list[str]:
    backends = torch.backends
    switches = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul)
    return [*(switch.fp32_precision for switch in switches), str(jax.config.jax_default_matmul_precision)]


def test_tf32_is_turned_on_in_both_frameworks_and_put_back_whatever_happens() -> None:
    before, cpus = settings(), (torch.device("cpu"), jax.devices("cpu")[0])

    def fail(dtype: str, expected: list[str]) -> None:
        with torch_pinned(dtype, cpus[0]), jax_pinned(dtype, cpus[1]):
            assert settings() == expected
            raise KeyError(dtype)

    for dtype, expected in (
        ("tf32", ["tf32", "tf32", "tf32", "ieee", "tensorfloat32"]),
        ("float32", ["ieee", "ieee", "ieee", "ieee", "highest"]),
    ):
        with pytest.raises(KeyError, match=dtype):
            fail(dtype, expected)
        assert settings() == before


# The judging.


def test_sums_are_in_float32_and_excuse_nothing_at_the_rounding_of_tf32() -> None:
    """Of a million places in float32 errors of 250 units are excused: as many units of TF32 are a fault."""
    truth = draw(50)
    for dtype, verdict in (("float32", "pass"), ("tf32", "mismatch")):
        off = truth + 100 * PRECISIONS[dtype].epsilon * rms(truth) * draw(50, seed=6)
        traced = {"torch": {"bias": off}, "jax": {"bias": truth}, "truth": {"bias": truth}}
        (row,) = compare.compare_level("gradients", dtype, traced, (10**6, 10**6))
        assert row.verdict == verdict


@pytest.mark.parametrize(
    ("dtype", "bits", "words"),
    [
        ("float32", 10, "torch errs as tf32 or float16 would"),
        ("float32", 7, "torch errs as bfloat16 would"),
        ("tf32", 7, "torch errs as bfloat16 would"),
        ("float32", 17, ""),
        ("float32", 2, ""),
    ],
)
def test_an_error_as_large_as_a_coarser_precision_makes_is_told(dtype: str, bits: int, words: str) -> None:
    coarse = Noise(*(2 * [0.3 * 2.0**-bits / PRECISIONS[dtype].epsilon]))
    fine = Noise(0.1, 0.1)
    assert as_coarse_as(Check("forward", dtype, "output", "mismatch", 8.0, 9.0, coarse, fine)) == words
    assert as_coarse_as(Check("forward", dtype, "output", "mismatch", 8.0, 9.0, coarse, coarse)) == ""
    assert as_coarse_as(Check("forward", dtype, "output", "mismatch", 0.0, note="missing in jax")) == ""


# With TF32.


@pytest.mark.usefixtures("with_tf32")
def test_the_emulated_devices_have_tf32_and_no_other_precision_changes() -> None:
    assert torch_products_absence("cpu", "tf32") is None
    assert jax_products_absence("cpu", "tf32") is None
    one, other = torch.from_numpy(draw(64, 64)).float(), torch.from_numpy(draw(64, 64, seed=6)).float()
    exact = (one.double() @ other.double()).float()
    with torch_pinned("float32", torch.device("cpu")), jax_pinned("float32", jax.devices("cpu")[0]):
        assert (one @ other - exact).abs().max() < 1e-4
        assert np.abs(jnp.matmul(one.numpy(), other.numpy()) - exact.numpy()).max() < 1e-4


@pytest.mark.usefixtures("with_tf32")
def test_an_honest_layer_passes_at_the_noise_of_tf32_on_every_level() -> None:
    levels = ("forward", "layers", "gradients", "training")
    report = check(pair({}), "float32", "tf32", levels=levels)
    assert report.verdict == "pass", wrong(report)
    assert report.notes == ()
    noises = {
        (row.level, row.dtype, row.name): noise.rms
        for row in report.checks
        for noise in (row.torch_noise, row.jax_noise)
        if noise is not None and row.view in ("", "propagated")
    }
    for row in (("forward", "output"), ("layers", "v"), ("gradients", "v.weight"), ("gradients", "input")):
        level, name = row
        assert 0.1 < noises[level, "tf32", name] < 2
        assert noises[level, "float32", name] < 4  # units of 2**-23
    assert noises["training", "tf32", "SGD: momentum of v.weight"] > 0.1
    jsonschema.validate(json.loads(report.to_json()), SCHEMA)
    assert report.environment["torch products in tf32"] == "cuda.matmul tf32, cudnn.conv tf32, cudnn.rnn tf32"
    assert report.environment["jax products in tf32"] == "jax_default_matmul_precision tensorfloat32"
    assert report.environment["torch products in float32"] == "cuda.matmul ieee, cudnn.conv ieee, cudnn.rnn ieee"
    assert report.environment["jax products in float32"] == "jax_default_matmul_precision highest"


@pytest.mark.usefixtures("with_tf32")
def test_an_honest_volo_with_convolutions_passes_at_the_noise_of_tf32() -> None:
    report = verify(*small_volo(), small_images(), levels=("forward", "gradients"), dtypes=("tf32",))
    assert report.verdict == "pass", wrong(report)
    stem = next(row for row in report.checks if row.name == "patch_embed.conv.0.weight" and row.level == "gradients")
    assert stem.torch_noise is not None
    assert stem.torch_noise.rms > 0.1


PLANTED = [
    fault
    for fault in FAULTS
    if fault.name.partition(": ")[2]
    in ("scale dropped", "heads interleaved", "value bias unused", "fold shifted by one")
]


@pytest.mark.usefixtures("with_tf32")
@pytest.mark.parametrize("fault", PLANTED, ids=lambda fault: fault.name)
def test_a_planted_fault_is_called_a_mismatch_where_it_is_in_tf32_alone(
    fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = pair(fault.sizes)
    fault.plant(layers, monkeypatch)
    report = check(layers, "tf32")
    assert (report.verdict, report.first_divergence) == ("mismatch", fault.path)
    assert "multiplies in full" not in str(report.cause)


def told(precision: str) -> tuple[Any, Any]:
    """Return the layer's twins, the JAX one told how to multiply."""
    torch_layer, _ = pair({})
    sizes = {"num_heads": 3, "stride": 2, "qkv_bias": True, "implementation": "reference"}
    jax_layer = outlook_jax.OutlookAttention(12, **sizes, precision=precision, rngs=nnx.Rngs(0))
    outlook_jax.load_weights(jax_layer, {name: tensor.numpy() for name, tensor in torch_layer.state_dict().items()})
    return torch_layer, jax_layer


@pytest.mark.usefixtures("with_tf32")
def test_a_twin_left_at_tf32_in_float32_is_a_mismatch_that_names_the_precision() -> None:
    report = check(told("tensorfloat32"), "float64", "float32")
    assert {row.dtype for row in wrong(report)} == {"float32"}
    assert (report.first_divergence, report.cause) == ("v", "Linear precision tf32 in jax, full in torch, at v")


@pytest.mark.usefixtures("with_tf32")
def test_a_function_left_at_tf32_in_float32_is_a_mismatch_that_names_the_precision() -> None:
    weight = draw(12, 8).astype(np.float32)

    def in_torch(x: torch.Tensor) -> torch.Tensor:
        switch, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
        switch.fp32_precision = "tf32"
        try:
            return x @ torch.from_numpy(weight).to(x.dtype)
        finally:
            switch.fp32_precision = before

    report = verify(in_torch, lambda x: x @ jnp.asarray(weight, x.dtype), draw(5, 12), dtypes=("float64", "float32"))
    assert report.verdict == "mismatch"
    assert report.cause == "output, in float32 alone: torch errs as tf32 or float16 would"


@pytest.mark.usefixtures("with_tf32")
def test_a_twin_that_multiplies_in_full_where_tf32_was_asked_for_passes_and_is_told() -> None:
    report = check(told("highest"), "float64", "tf32")
    assert report.verdict == "pass"
    (note,) = report.notes
    assert note.startswith("in tf32 jax shows no rounding of products and torch does")
    assert "Linear precision full in jax, tf32 in torch, at v" in report.differences


@pytest.mark.usefixtures("with_tf32")
def test_where_the_rounding_of_the_other_grows_it_is_a_mismatch_that_names_the_precision() -> None:
    """A difference of two products that are nearly the same: what they round is large beside it."""
    weights = draw(12, 8).astype(np.float32)
    other = weights + np.float32(1e-2) * draw(12, 8, seed=6).astype(np.float32)

    def in_torch(x: torch.Tensor) -> torch.Tensor:
        return x @ torch.from_numpy(weights).to(x.dtype) - x @ torch.from_numpy(other).to(x.dtype)

    def in_jax(x: jax.Array) -> jax.Array:
        one, two = (jnp.matmul(x, jnp.asarray(w, x.dtype), precision="highest") for w in (weights, other))
        return one - two

    report = verify(in_torch, in_jax, draw(5, 12), dtypes=("float64", "float32", "tf32"), levels=("forward",))
    assert {row.dtype for row in wrong(report)} == {"tf32"}
    assert str(report.cause).startswith("in tf32 alone: jax shows no rounding of products and torch does")


@pytest.mark.usefixtures("with_tf32")
def test_twins_without_products_pass_in_tf32_and_that_is_told() -> None:
    report = verify(lambda x: x.sin(), jnp.sin, draw(5, 12), dtypes=("tf32",), levels=("forward",))
    assert report.verdict == "pass"
    assert report.notes[0].startswith("in tf32 neither twin shows any rounding of products")


@pytest.mark.usefixtures("with_tf32")
def test_traces_in_tf32_are_compared_by_their_noise(tmp_path: Path) -> None:
    options = ("--model", "layer", "--dtype")
    files = {twin: tmp_path / f"{twin}.trace" for twin in ("torch", "jax", "truth")}
    for twin in ("torch", "jax"):
        traced = outlook("trace", "--framework", twin, *options, "tf32", "--out", files[twin])
        assert traced.exit_code == 0, traced.output
    # Numbers are kept in float32: a truth of those is one of TF32's.
    exact = ("float64", "--rounded-to", "float32")
    outlook("trace", "--framework", "torch", *options, *exact, "--out", files["truth"])
    compared = outlook("compare", files["torch"], files["jax"], "--truth", files["truth"], "--json")
    assert compared.exit_code == 0, compared.output
    report = json.loads(compared.output)
    jsonschema.validate(report, SCHEMA)
    assert {row["dtype"] for row in report["checks"]} == {"tf32"}
    assert all(0.1 < row["torch_noise"]["rms"] < 2 for row in report["checks"] if row["level"] == "forward")
    assert report["notes"] == []
    assert report["environment"]["torch: products"] == "cuda.matmul tf32, cudnn.conv tf32, cudnn.rnn tf32"
    assert report["environment"]["jax: products"] == "jax_default_matmul_precision tensorfloat32"
    in_float32 = outlook("trace", "--framework", "jax", *options, "float32", "--out", files["jax"])
    assert in_float32.exit_code == 0
    trace = read(files["jax"])
    write(files["jax"], replace(trace, header=replace(trace.header, dtype="tf32", rounded_to="tf32")))
    report = json.loads(outlook("compare", files["torch"], files["jax"], "--truth", files["truth"], "--json").output)
    assert report["notes"][0].startswith("in tf32 jax shows no rounding of products and torch does")
