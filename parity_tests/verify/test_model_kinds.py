"""JAX models of every kind that the verifier takes without another package: functions, pytrees, apply."""

from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from outlook_parity import load_torch_weights, verify

pytestmark = pytest.mark.usefixtures("quick_compilation")

X = np.random.default_rng(0).standard_normal((4, 6))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.drop, self.last = nn.Linear(6, 8), nn.Dropout(0.25), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.drop(torch.tanh(self.first(x))))


def zeros() -> dict[str, Any]:
    sizes = {"first": (6, 8), "last": (8, 3)}
    return {name: {"kernel": jnp.zeros(size), "bias": jnp.zeros(size[1])} for name, size in sizes.items()}


def mlp(weights: Any, x: Any, *, train: bool = False, rate: float = 0.25) -> Any:
    y = jnp.tanh(x @ weights["first"]["kernel"] + weights["first"]["bias"])
    if train:
        y = y * jax.random.bernoulli(jax.random.key(3), 1 - rate, y.shape) / (1 - rate)
    return y @ weights["last"]["kernel"] + weights["last"]["bias"]


def test_a_function_of_a_pytree_agrees_on_every_level_but_modules_and_shares_its_dropout() -> None:
    theirs = MLP()
    ours = load_torch_weights((mlp, zeros()), theirs)
    report = verify(theirs, ours, X)
    assert report.verdict == "pass", [row for row in report.checks if row.verdict == "mismatch"]
    assert {row.level for row in report.checks} == {"weights", "forward", "again", "gradients", "training"}
    assert "layers left out" in str(report)


@pytest.mark.parametrize("fault", ["weight", "rate"])
def test_a_fault_in_a_function_of_a_pytree_is_called(fault: str) -> None:
    theirs = MLP()
    function, weights = load_torch_weights((mlp, zeros()), theirs)
    if fault == "weight":
        weights["last"]["kernel"] = weights["last"]["kernel"][::-1]
    else:
        honest = function

        def function(weights: Any, x: Any, *, train: bool = False) -> Any:
            return honest(weights, x, train=train, rate=0.5)

    report = verify(theirs, (function, weights), X, dtypes=("float64",))
    assert report.verdict == "mismatch"
    assert ("last.weight" in str(report.cause)) == (fault == "weight")


class LinenMLP(linen.Module):
    @linen.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        y = linen.Dropout(0.25, deterministic=not train)(jnp.tanh(linen.Dense(8, name="first")(x)))
        return linen.Dense(3, name="last")(y)


def test_apply_and_variables_are_the_linen_module_with_its_layers() -> None:
    module = LinenMLP()
    _, variables = load_torch_weights((module, module.init(jax.random.key(0), X)), MLP())
    report = verify(MLP(), (module.apply, variables), X, dtypes=("float64",))
    assert report.verdict == "pass", [row for row in report.checks if row.verdict == "mismatch"]
    assert {"first", "last"} <= {row.name for row in report.checks if row.level == "layers"}


def closed_over(module: nn.Module) -> Any:
    """Return the weights as NumPy arrays in float32, for a function to hold."""
    state = {name: value.detach().numpy() for name, value in module.state_dict().items()}
    names = ("first", "last")
    return {name: {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]} for name in names}


def test_a_function_without_weights_is_compared_with_a_module_and_what_is_left_out_is_said() -> None:
    theirs = MLP()
    report = verify(theirs, lambda x: mlp(closed_over(theirs), x), X, dtypes=("float64",))
    assert report.verdict == "pass", [row for row in report.checks if row.verdict == "mismatch"]
    assert {row.level for row in report.checks} == {"forward", "again", "gradients"}
    assert {row.name for row in report.checks if row.level == "gradients"} == {"input"}
    assert any("a function without weights: the 4 parameters of torch and their gradients" in n for n in report.notes)
    assert "layers and training left out" in str(report)
    wrong = verify(theirs, lambda x: 1.01 * mlp(closed_over(theirs), x), X, dtypes=("float64",))
    assert wrong.verdict == "mismatch"


def test_a_function_of_torch_is_compared_with_a_module_of_jax() -> None:
    theirs = MLP().double().eval()
    weights = closed_over(MLP())
    report = verify(lambda x: theirs(x.double()).to(x.dtype), (mlp, weights), X, dtypes=("float64",))
    assert report.verdict == "pass", [row for row in report.checks if row.verdict == "mismatch"]
    assert {row.name for row in report.checks if row.level == "gradients"} == {"input"}
    assert any("the torch model is a function without weights: the 4 parameters of JAX" in n for n in report.notes)


def test_something_that_is_no_model_is_refused_with_what_would_work() -> None:
    with pytest.raises(TypeError, match=r"a pair \(function, weights\), .* got a tuple of dict, dict"):
        verify(MLP(), ({}, {}), X)
