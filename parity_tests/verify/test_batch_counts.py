"""PyTorch's BatchNorm counts batches: compared exactly where the JAX twin counts too, left out where it does not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flax import nnx
from typer.testing import CliRunner, Result

import outlook_jax.batch_norm
from outlook_parity import NameMap, load_torch_weights, verify
from outlook_parity.cli.app import app

pytestmark = pytest.mark.usefixtures("quick_compilation")

THIS = "parity_tests.verify.test_batch_counts"
NAMES = NameMap(torch_axes=(0, 3, 1, 2))
COUNTER = "bn.num_batches_tracked"


class TorchNet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 1)
        self.bn = torch.nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x)).mean((2, 3))


class NNXNet(nnx.Module):
    def __init__(self, norm: Any) -> None:
        self.conv = nnx.Conv(3, 4, (1, 1), rngs=nnx.Rngs(0))
        self.bn = norm

    def __call__(self, x: Any) -> Any:
        return self.bn(self.conv(x)).mean((1, 2))


def torch_net() -> torch.nn.Module:
    torch.manual_seed(0)
    net = TorchNet()
    for _ in range(3):
        net(torch.randn(2, 3, 5, 5))
    return net


def counting() -> Any:
    return load_torch_weights(NNXNet(outlook_jax.batch_norm.BatchNorm(4)), torch_net())


def miscounting() -> Any:
    net = counting()
    net.bn.num_batches_tracked[...] += 1
    return net


def not_counting() -> Any:
    norm = nnx.BatchNorm(4, momentum=0.9, epsilon=1e-5, use_fast_variance=False, rngs=nnx.Rngs(0))
    return load_torch_weights(NNXNet(norm), torch_net())


def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 5, 5, 3))


def test_a_count_of_batches_that_both_keep_is_compared_before_and_after_training() -> None:
    report = verify(torch_net(), counting(), images(), steps=2, names=NAMES)
    assert report.verdict == "pass", [row for row in report.checks if row.verdict == "mismatch"]
    rows = {(row.level, row.dtype, row.name): row for row in report.checks if row.name.endswith(COUNTER)}
    assert set(rows) == {
        ("weights", "as given", COUNTER),
        *(
            ("training", dtype, f"{optimizer}: {COUNTER}")
            for dtype in ("float64", "float32")
            for optimizer in ("SGD", "AdamW")
        ),
    }
    assert {row.verdict for row in rows.values()} == {"pass"}


def test_another_count_of_batches_is_a_mismatch() -> None:
    report = verify(torch_net(), miscounting(), images(), levels=("forward",), dtypes=("float64",), names=NAMES)
    (row,) = [row for row in report.checks if row.verdict == "mismatch"]
    assert (row.level, row.name, row.measured) == ("weights", COUNTER, 0.25)
    assert report.cause is not None
    assert COUNTER in report.cause


def test_a_count_that_stands_still_in_training_is_a_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    def uncounted(self: Any, x: Any, real: Any = outlook_jax.batch_norm.BatchNorm._batch_statistics) -> Any:
        count = self.num_batches_tracked[...]
        found = real(self, x)
        self.num_batches_tracked[...] = count
        return found

    monkeypatch.setattr(outlook_jax.batch_norm.BatchNorm, "_batch_statistics", uncounted)
    report = verify(torch_net(), counting(), images(), levels=("training",), dtypes=("float64",), names=NAMES)
    wrong = {row.name for row in report.checks if row.verdict == "mismatch"}
    assert wrong == {f"SGD: {COUNTER}", f"AdamW: {COUNTER}"}


def test_a_count_that_flax_does_not_keep_is_not_missed() -> None:
    report = verify(torch_net(), not_counting(), images(), levels=("forward",), dtypes=("float64",), names=NAMES)
    assert report.verdict == "pass"
    assert not [row for row in report.checks if row.name.endswith(COUNTER)]


def outlook(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=True)


@pytest.mark.parametrize(
    ("factory", "code", "words"),
    [
        ("counting", 0, "PASS"),
        ("not_counting", 0, "PASS"),
        ("miscounting", 1, f"different weights in the traces of torch and jax: {COUNTER}"),
    ],
)
def test_traces_are_of_the_same_count_where_both_keep_one(factory: str, code: int, words: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", images())
    traces = tmp_path / "a.trace", tmp_path / "b.trace"
    given = (
        "--inputs",
        tmp_path / "x.npy",
        "--torch-axes",
        "0,3,1,2",
        "--level",
        "forward",
        "--level",
        "gradients",
        "--quiet",
    )
    torch_trace = ("--torch", f"{THIS}:torch_net", "--out", traces[0])
    jax_trace = ("--jax", f"{THIS}:{factory}", "--names", traces[0], "--out", traces[1])
    for trace in (torch_trace, jax_trace):
        written = outlook("trace", *trace, *given)
        assert (written.exit_code, written.stderr) == (0, "")
    for pair in (traces, traces[::-1]):
        compared = outlook("compare", *pair)
        assert compared.exit_code == code
        if code == 0:
            assert words in compared.output
        else:
            assert COUNTER in str(compared.exception)
            assert "different weights" in str(compared.exception)
