"""Models of Equinox, Haiku, Keras and Hugging Face as they come, against PyTorch. Run where those are installed."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.torchvision_stub import declare_missing_torchvision_operators
from outlook_parity import Report, load_torch_weights, verify

pytestmark = pytest.mark.filterwarnings("ignore")  # of other packages

os.environ.setdefault("KERAS_BACKEND", "jax")

X = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(torch.tanh(self.first(x))))


def wrong(report: Report) -> list[Any]:
    return [row for row in report.checks if row.verdict in ("mismatch", "not-run")]


def equinox_mlp(eps: float = 1e-5) -> Any:
    eqx = pytest.importorskip("equinox")

    class Twin(eqx.Module):  # type: ignore[misc,name-defined]
        first: Any
        norm: Any
        last: Any

        def __call__(self, x: Any) -> Any:
            return self.last(self.norm(jnp.tanh(self.first(x))))

    keys = jax.random.split(jax.random.key(0), 2)
    return Twin(eqx.nn.Linear(6, 8, key=keys[0]), eqx.nn.LayerNorm(8, eps), eqx.nn.Linear(8, 3, key=keys[1]))


def test_an_equinox_module_agrees_on_every_level() -> None:
    ours = load_torch_weights(equinox_mlp(), MLP())
    report = verify(MLP(), ours, X[0])
    assert report.verdict == "pass", wrong(report)
    assert {"first", "norm", "last"} <= {row.name for row in report.checks if row.level == "layers"}


def test_an_equinox_module_under_vmap_is_a_function_of_its_weights() -> None:
    ours = load_torch_weights(equinox_mlp(), MLP())
    report = verify(MLP(), (lambda model, x: jax.vmap(model)(x), ours), X, dtypes=("float64",))
    assert report.verdict == "pass", wrong(report)


def test_a_convolution_of_equinox_agrees() -> None:
    eqx = pytest.importorskip("equinox")
    theirs = nn.Conv2d(3, 5, 3, padding=1)
    ours = load_torch_weights(eqx.nn.Conv2d(3, 5, 3, padding=1, key=jax.random.key(0)), theirs)
    report = verify(theirs, ours, np.random.default_rng(0).standard_normal((3, 6, 6)), dtypes=("float64",))
    assert report.verdict == "pass", wrong(report)


def test_a_fault_in_an_equinox_module_is_placed() -> None:
    ours = load_torch_weights(equinox_mlp(1e-3), MLP())
    report = verify(MLP(), ours, X[0], dtypes=("float64",))
    assert report.verdict == "mismatch"
    assert report.first_divergence == "norm"


def haiku_mlp() -> Any:
    hk = pytest.importorskip("haiku")

    def forward(x: Any) -> Any:
        y = hk.LayerNorm(-1, True, True, name="norm")(jnp.tanh(hk.Linear(8, name="first")(x)))
        return hk.Linear(3, name="last")(y)

    return hk.transform(forward)


@pytest.mark.parametrize("apply", [False, True], ids=["transformed", "apply"])
def test_a_transformed_function_of_haiku_agrees_on_every_level(apply: bool) -> None:
    transformed = haiku_mlp()
    parameters = transformed.init(jax.random.key(0), X)
    ours = load_torch_weights((transformed.apply if apply else transformed, parameters), MLP())
    report = verify(MLP(), ours, X)
    assert report.verdict == "pass", wrong(report)
    assert {"first", "norm", "last"} <= {row.name for row in report.checks if row.level == "layers"}


def keras_mlp(epsilon: float = 1e-5) -> Any:
    keras = pytest.importorskip("keras")
    layers = [
        keras.layers.Input((6,)),
        keras.layers.Dense(8, activation="tanh", name="first"),
        keras.layers.LayerNormalization(epsilon=epsilon, name="norm"),
        keras.layers.Dense(3, name="last"),
    ]
    return keras.Sequential(layers)


def test_a_keras_model_agrees_on_every_level() -> None:
    ours = load_torch_weights(keras_mlp(), MLP())
    report = verify(MLP(), ours, X, dtypes=("float32",))
    assert report.verdict == "pass", wrong(report)
    verdicts = {row.name: row.verdict for row in report.checks if row.level == "layers"}
    assert verdicts["first"] == "skipped", "it has its activation inside, PyTorch's has not"
    assert (verdicts["norm"], verdicts["last"]) == ("pass", "pass")
    assert ours.dtype_policy.name == "float32"
    faulty = verify(MLP(), load_torch_weights(keras_mlp(1e-3), MLP()), X, dtypes=("float32",))
    assert faulty.verdict == "mismatch"


def test_a_dropout_of_keras_is_shared() -> None:
    keras = pytest.importorskip("keras")
    dense = {"first": keras.layers.Dense(8, name="first"), "last": keras.layers.Dense(3, name="last")}
    ours = keras.Sequential([keras.layers.Input((6,)), dense["first"], keras.layers.Dropout(0.25), dense["last"]])

    class Theirs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.drop, self.last = nn.Linear(6, 8), nn.Dropout(0.25), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.drop(self.first(x)))

    theirs = Theirs()
    report = verify(theirs, load_torch_weights(ours, theirs), X, levels=("training",), dtypes=("float64",))
    assert report.verdict == "pass", wrong(report)
    theirs.drop.p = 0.5
    assert verify(theirs, ours, X, levels=("training",), dtypes=("float64",)).verdict == "mismatch"


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_a_hugging_face_model_agrees_as_it_comes_with_inputs_by_keyword(name: str) -> None:
    declare_missing_torchvision_operators()
    pytest.importorskip("transformers.modeling_flax_utils")
    from parity_tests.world import pairs

    made = getattr(pairs, name)()
    mask = np.ones_like(made.inputs["input_ids"])
    mask[0, -2:] = 0
    report = verify(made.torch_model, made.jax_model, {"attention_mask": mask, **made.inputs}, dtypes=("float64",))
    assert report.verdict == "pass", wrong(report)
    assert {row.level for row in report.checks} >= {"layers", "gradients", "training"}
