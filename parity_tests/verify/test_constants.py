"""Twins with arrays that are no variables: NNX takes what is assigned, or marked by `nnx.data`, as leaves."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from outlook_parity import load_torch_weights, verify

pytestmark = pytest.mark.usefixtures("quick_compilation")

DIM = 8


class InTorch(torch.nn.Module):
    def __init__(self, name: str = "table") -> None:
        super().__init__()
        self.fc = torch.nn.Linear(DIM, DIM)
        self.name = name
        self.register_buffer(name, torch.arange(float(DIM)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + getattr(self, self.name)


class InJax(nnx.Module):
    def __init__(self, table: Any) -> None:
        self.fc = nnx.Linear(DIM, DIM, rngs=nnx.Rngs(0))
        self.table = table

    def __call__(self, x: jax.Array) -> jax.Array:
        table = self.table["inner"][0] if isinstance(self.table, dict) else self.table
        return self.fc(x) + table


class InJaxBesides(InJax):
    """Leaves of every kind, as far as NNX takes them."""

    def __init__(self) -> None:
        super().__init__(nnx.data({"inner": [jnp.arange(float(DIM))]}))
        self.numpy = nnx.data(np.arange(3))
        self.key = nnx.data(jax.random.key(0))
        self.factor = nnx.data(1.0)
        self.scaled = nnx.data(True)
        self.inside = nnx.List([nnx.Dict(steps=jnp.arange(2))])

    def __call__(self, x: jax.Array) -> jax.Array:
        out = super().__call__(x)
        return out * self.factor if self.scaled else out  # a number that is traced could not decide


x = np.random.default_rng(0).standard_normal((4, DIM))


@pytest.mark.parametrize("mark", [lambda table: table, nnx.data, lambda table: nnx.data(np.asarray(table))])
def test_a_constant_is_compared_with_the_buffer_of_its_name(mark: Any) -> None:
    theirs = InTorch()
    ours = load_torch_weights(InJax(mark(jnp.arange(float(DIM)))), theirs)
    report = verify(theirs, ours, x, dtypes=("float64", "float32"), steps=2)
    assert report.verdict == "pass", [row for row in report.checks if row.verdict == "mismatch"]
    assert [row.verdict for row in report.checks if (row.level, row.name) == ("weights", "table")] == ["pass"]
    assert not [note for note in report.notes if "constants" in note]


def test_a_constant_of_other_numbers_is_a_mismatch() -> None:
    theirs = InTorch()
    ours = load_torch_weights(InJax(jnp.arange(float(DIM)).at[2].add(1e-3)), theirs)
    report = verify(theirs, ours, x, levels=("forward",), dtypes=("float64",))
    assert [row.verdict for row in report.checks if (row.level, row.name) == ("weights", "table")] == ["mismatch"]
    assert report.verdict == "mismatch"


def test_a_constant_without_a_buffer_of_its_name_is_noted() -> None:
    theirs = InTorch("other")
    ours = load_torch_weights(InJax(jnp.arange(float(DIM))), theirs)
    report = verify(theirs, ours, x, levels=("forward", "layers"), dtypes=("float64",))
    assert report.verdict == "pass", [row for row in report.checks if row.verdict == "mismatch"]
    assert "constants of the JAX model without a buffer of that name in torch: table (8,)" in report.notes


def test_leaves_of_every_kind_are_carried_along() -> None:
    theirs = InTorch("other")
    ours = load_torch_weights(InJaxBesides(), theirs)
    report = verify(theirs, ours, x, dtypes=("float64",), steps=2)
    assert report.verdict == "pass", [row for row in report.checks if row.verdict == "mismatch"]
    (note,) = [note for note in report.notes if "constants" in note]
    assert "table.inner.0 (8,)" in note
    assert "inside.0.steps (2,)" in note
