"""Honest differences that are notes with a reason, and faults beside them that are called all the same."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from outlook_parity import Report, verify
from outlook_parity.cli.app import app

pytestmark = pytest.mark.usefixtures("quick_compilation")

X = np.random.default_rng(0).standard_normal((4, 6))
WEIGHTS = np.random.default_rng(1).standard_normal((6, 6))


class Twin(nn.Module):
    """A linear map and positions, with a token that no output depends on."""

    def __init__(self, *, frozen: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(WEIGHTS.copy()))
        self.positions = nn.Parameter(torch.linspace(0.5, 1, 6).double(), requires_grad=not frozen)
        self.token = nn.Parameter(torch.ones(3).double())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.positions) @ self.weight


def weights(*without: str) -> dict[str, Any]:
    every = {"weight": WEIGHTS, "positions": np.linspace(0.5, 1, 6, dtype=np.float32), "token": np.ones(3)}
    return {name: np.asarray(value) for name, value in every.items() if name not in without}


def linear(weights: Any, x: Any) -> Any:
    return (x + weights["positions"]) @ weights["weight"]


def stopped(weights: Any, x: Any) -> Any:
    return (x + jax.lax.stop_gradient(weights["positions"])) @ weights["weight"]


def check(torch_model: nn.Module, jax_model: Any, given: Any, **options: Any) -> Report:
    torch_model.positions.data = torch.from_numpy(weights()["positions"]).double()  # type: ignore[union-attr,operator]
    return verify(torch_model, (jax_model, given), X, dtypes=("float64",), **options)


def test_a_parameter_that_nothing_depends_on_trains_alike_in_both() -> None:
    report = check(Twin(), linear, weights())
    assert report.verdict == "pass", [row for row in report.checks if row.verdict == "mismatch"]
    assert next(r for r in report.checks if r.name == "AdamW: token").verdict == "pass"  # it decays


def test_a_parameter_that_nothing_depends_on_may_be_missing_in_jax() -> None:
    report = check(Twin(), linear, weights("token"))
    assert report.verdict == "pass", [row for row in report.checks if row.verdict == "mismatch"]
    notes = {row.note for row in report.checks if row.verdict == "skipped" and "token" in row.name}
    assert notes == {"unused: no output depends on it in torch, and JAX has no such weight"}
    assert "rows unused" in str(report)


def test_a_parameter_that_nothing_depends_on_may_be_missing_in_torch() -> None:
    report = check(Twin(), linear, weights() | {"mask": np.ones(5)})
    assert report.verdict == "pass", [row for row in report.checks if row.verdict == "mismatch"]
    notes = {row.note for row in report.checks if row.verdict == "skipped" and "mask" in row.name}
    assert notes == {"unused: no output depends on it in JAX, and torch has no such weight"}


@pytest.mark.parametrize("factor", [0.0, 1.0])
def test_a_parameter_that_matters_must_not_be_missing_in_torch(factor: float) -> None:
    def ours(given: Any, x: Any) -> Any:
        # Behind a stop, or times zero, it has no gradient.
        return linear(given, x) + factor * jax.lax.stop_gradient(given["mask"]).sum()

    report = check(Twin(), ours, weights() | {"mask": np.zeros(5)})
    assert report.verdict == "mismatch"
    assert "mask: missing in torch" in str(report.cause)


def test_a_parameter_that_matters_must_not_be_missing_in_jax() -> None:
    def ours(given: Any, x: Any) -> Any:
        return x @ given["weight"] + weights()["positions"] @ given["weight"]

    report = check(Twin(), ours, weights("token", "positions"))
    assert report.verdict == "mismatch"
    assert "positions: missing in jax" in str(report.cause)


def test_a_parameter_that_is_frozen_here_and_stopped_there_is_a_note() -> None:
    report = check(Twin(frozen=True), stopped, weights())
    assert report.verdict == "pass", [row for row in report.checks if row.verdict == "mismatch"]
    row = next(r for r in report.checks if (r.level, r.name) == ("gradients", "positions"))
    assert (row.verdict, row.note.partition(":")[0]) == ("skipped", "frozen")
    assert "1 rows frozen" in str(report)
    assert check(Twin(frozen=True), stopped, weights(), levels=("training",)).verdict == "pass"


@pytest.mark.parametrize(("frozen", "function"), [(False, stopped), (True, lambda w, x: 1.5 * stopped(w, x))])
def test_a_gradient_that_is_stopped_in_one_twin_alone_is_called(frozen: bool, function: Any) -> None:
    assert check(Twin(frozen=frozen), function, weights()).verdict == "mismatch"


def test_a_frozen_parameter_that_jax_trains_is_compared_as_any_other() -> None:
    report = check(Twin(frozen=True), linear, weights())
    assert report.verdict == "pass", [row for row in report.checks if row.verdict == "mismatch"]
    assert next(r for r in report.checks if (r.level, r.name) == ("gradients", "positions")).verdict == "pass"


def test_rows_are_ignored_with_a_reason_and_counted() -> None:
    given = weights() | {"token": 2 * np.ones(3)}
    options: dict[str, Any] = {"levels": ("forward", "gradients")}
    assert check(Twin(), linear, given, **options).verdict == "mismatch"
    report = check(Twin(), linear, given, **options, ignore={"tok*": "initialised otherwise"})
    assert report.verdict == "pass"
    assert "2 rows ignored" in str(report)
    rows = [row for row in report.checks if row.name == "token"]
    assert {(row.verdict, row.note) for row in rows} == {("skipped", "ignored: initialised otherwise")}


def test_a_waiver_hides_no_other_row_and_cannot_empty_the_comparison() -> None:
    options: dict[str, Any] = {"levels": ("forward",)}
    wrong = check(Twin(), lambda w, x: 2 * linear(w, x), weights(), **options, ignore={"token": "unused"})
    assert wrong.verdict == "mismatch"
    assert check(Twin(), linear, weights(), **options, ignore={"*": "no time"}).verdict == "not-run"


@pytest.mark.parametrize(
    ("ignore", "message"),
    [
        ({"toke": "unused"}, r"ignore matches none of the \d+ rows: 'toke'; the nearest name is 'token'"),
        ({"token": " "}, "patterns with reasons"),
    ],
    ids=["nothing", "no reason"],
)
def test_a_waiver_that_matches_nothing_or_has_no_reason_is_an_error(ignore: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(Twin(), linear, weights(), levels=("forward",), ignore=ignore)


def test_the_command_line_takes_waivers_with_their_reasons() -> None:
    result = CliRunner().invoke(app, ["verify", "--ignore", "head.bias"])
    assert isinstance(result.exception, ValueError)
    assert "--ignore must be PATTERN=REASON" in str(result.exception)


class Attention(nn.Module):
    def __init__(self, rate: float = 0.25) -> None:
        super().__init__()
        self.rate, self.weight = rate, nn.Parameter(torch.from_numpy(WEIGHTS.copy()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight
        probabilities = (y @ y.mT).softmax(-1)
        return nn.functional.dropout(probabilities, self.rate, self.training) @ y


def attention(weights: Any, x: Any, *, train: bool = False, rate: float = 0.25, shape: Any = (1, 5, 5)) -> Any:
    y = x @ weights["weight"]
    probabilities = jax.nn.softmax(y @ y.mT, -1)
    if train:
        probabilities *= jax.random.bernoulli(jax.random.key(0), 1 - rate, shape) / (1 - rate)
    return probabilities @ y


def trained(function: Any) -> Report:
    x = np.random.default_rng(2).standard_normal((3, 5, 6))
    return verify(Attention(), (function, {"weight": WEIGHTS}), x, levels=("training",), dtypes=("float64",))


def test_masks_for_all_samples_cannot_be_shared_and_then_nothing_is_dropped_which_is_said() -> None:
    report = trained(attention)
    assert report.verdict == "pass", [row for row in report.checks if row.verdict == "mismatch"]
    assert "nothing was dropped in training" in report.notes[0]
    assert "of shape (3, 5, 5) in torch, in JAX one of shape (1, 5, 5)" in report.notes[0]


def test_masks_of_the_same_shape_are_shared() -> None:
    report = trained(lambda w, x, train=False: attention(w, x, train=train, shape=(3, 5, 5)))
    assert (report.verdict, report.notes) == ("pass", ())


@pytest.mark.parametrize("options", [{"rate": 0.5}, {"rate": 0.0}, {"shape": (3, 5, 1)}, {"shape": (5, 5)}], ids=str)
def test_another_rate_or_masks_along_other_axes_are_called(options: dict[str, Any]) -> None:
    report = trained(lambda w, x, train=False: attention(w, x, train=train, **options))
    assert report.verdict == "mismatch"


class Failing(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.inner, self.error = nn.Sequential(nn.Linear(6, 6)), error
        self.inner.append(Raising(error))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Raising(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float64:
            raise self.error
        return x


@pytest.mark.parametrize("error", [KeyError("position"), RuntimeError("a" * 5000), ZeroDivisionError()], ids=repr)
def test_a_model_that_fails_in_one_precision_is_an_error_with_module_shapes_and_line(error: Exception) -> None:
    def ours(weights: Any, x: Any) -> Any:
        return x @ weights["inner"]["0"]["kernel"] + weights["inner"]["0"]["bias"]

    given = {"inner": {"0": {"kernel": jnp.zeros((6, 6)), "bias": jnp.zeros(6)}}}
    with pytest.raises(ValueError, match=r"the torch model fails in inner.1 on input of shape \(4, 6\): ") as found:
        verify(Failing(error), (ours, given), X)
    assert type(error).__name__ in str(found.value)
    assert "test_notes.py, line" in str(found.value)
    assert len(str(found.value)) < 2000
