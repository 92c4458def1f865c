"""What models say about themselves, in common words, and where twins say different things."""

from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import outlook_jax.batch_norm
from outlook_parity.backends.jax import attributes as jax_semantics
from outlook_parity.backends.torch import attributes as torch_semantics
from outlook_parity.backends.torch.model import kinds_of
from outlook_parity.compare.modules import Suspect
from outlook_parity.core import attributes as semantics
from outlook_parity.core.attributes import Difference
from outlook_parity.core.check import Check
from outlook_parity.core.dropout import Draw
from outlook_parity.core.precision import Products
from outlook_parity.diagnose import causes

pytestmark = pytest.mark.usefixtures("quick_compilation")


def rngs() -> nnx.Rngs:
    return nnx.Rngs(0)


# Pairs are built in their tests: building all of them would slow down every collection.
SAME = {
    "LayerNorm": lambda: (torch.nn.LayerNorm(4), nnx.LayerNorm(4, epsilon=1e-5, use_fast_variance=False, rngs=rngs())),
    "GroupNorm": lambda: (
        torch.nn.GroupNorm(2, 4),
        nnx.GroupNorm(4, 2, epsilon=1e-5, use_fast_variance=False, rngs=rngs()),
    ),
    "BatchNorm": lambda: (
        torch.nn.BatchNorm2d(4),
        nnx.BatchNorm(4, momentum=0.9, epsilon=1e-5, use_fast_variance=False, rngs=rngs()),
    ),
    "BatchNorm of ours": lambda: (torch.nn.BatchNorm2d(4), outlook_jax.batch_norm.BatchNorm(4)),
    "Linear": lambda: (torch.nn.Linear(4, 3), nnx.Linear(4, 3, rngs=rngs())),
    "Linear of Linen": lambda: (torch.nn.Linear(4, 3, bias=False), linen.Dense(3, use_bias=False)),
    "Conv": lambda: (
        torch.nn.Conv2d(4, 8, 3, 2, padding=1, groups=2),
        nnx.Conv(4, 8, (3, 3), (2, 2), padding=1, feature_group_count=2, rngs=rngs()),
    ),
    "Conv with a word for its padding": lambda: (
        torch.nn.Conv2d(4, 8, 3, padding="valid"),
        nnx.Conv(4, 8, (3, 3), padding=0, rngs=rngs()),
    ),
    "Conv padded evenly": lambda: (
        torch.nn.Conv2d(4, 8, (4, 3), padding="same"),
        nnx.Conv(4, 8, (4, 3), padding=((1, 2), (1, 1)), rngs=rngs()),
    ),
    "Conv around the edge": lambda: (
        torch.nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"),
        nnx.Conv(4, 8, (3, 3), padding="CIRCULAR", rngs=rngs()),
    ),
    "Conv of what came before": lambda: (
        torch.nn.Conv1d(4, 8, 3, padding=2),
        nnx.Conv(4, 8, (3,), padding="CAUSAL", rngs=rngs()),
    ),
    "Dropout": lambda: (torch.nn.Dropout(0.1), nnx.Dropout(0.1, rngs=rngs())),
}

OTHER = {
    "eps": lambda: (torch.nn.LayerNorm(4), nnx.LayerNorm(4, use_fast_variance=False, rngs=rngs())),
    "momentum": lambda: (torch.nn.BatchNorm2d(4), nnx.BatchNorm(4, use_fast_variance=False, rngs=rngs())),
    "variance": lambda: (torch.nn.LayerNorm(4), nnx.LayerNorm(4, rngs=rngs())),
    "padding mode": lambda: (
        torch.nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"),
        nnx.Conv(4, 8, (3, 3), padding=1, rngs=rngs()),
    ),
    "bias": lambda: (torch.nn.Linear(4, 3), linen.Dense(3, use_bias=False)),
    "features": lambda: (torch.nn.Linear(4, 3), linen.Dense(4)),
    "precision": lambda: (torch.nn.Linear(4, 3), nnx.Linear(4, 3, precision="bfloat16", rngs=rngs())),
    "stride": lambda: (torch.nn.Conv2d(4, 8, 3, 2, padding=1), nnx.Conv(4, 8, (3, 3), padding=1, rngs=rngs())),
    "padding": lambda: (
        torch.nn.Conv2d(4, 8, 3, padding=1),
        nnx.Conv(4, 8, (3, 3), padding=((0, 2), (1, 1)), rngs=rngs()),
    ),
    "dilation": lambda: (
        torch.nn.Conv2d(4, 8, 3, padding=1, dilation=2),
        nnx.Conv(4, 8, (3, 3), padding=1, rngs=rngs()),
    ),
    "groups": lambda: (torch.nn.GroupNorm(2, 4), nnx.GroupNorm(4, 4, epsilon=1e-5, rngs=rngs())),
    "dropout rate": lambda: (torch.nn.Dropout(0.1), nnx.Dropout(0.2, rngs=rngs())),
}


def differences(torch_module: torch.nn.Module, jax_module: Any, products: Products = "full") -> list[Difference]:
    facts = (
        torch_semantics.attributes_of(torch_module, products),
        jax_semantics.attributes_of({"": jax_module}, products),
    )
    assert facts[0][""], "nothing is known of this module"
    assert facts[1][""], "nothing is known of this module"
    return semantics.differences(*facts, kinds_of(torch_module))


@pytest.mark.parametrize("name", SAME)
def test_equal_modules_say_the_same(name: str) -> None:
    assert differences(*SAME[name]()) == []


@pytest.mark.parametrize("fact", OTHER)
def test_what_modules_say_differently_is_named(fact: str) -> None:
    assert fact in [difference.attribute for difference in differences(*OTHER[fact]())]


def test_a_difference_is_told_in_words() -> None:
    (difference,) = differences(*OTHER["eps"]())
    assert str(difference) == "LayerNorm eps 1e-06 in jax, 1e-05 in torch, at (model)"
    (difference,) = differences(*OTHER["momentum"]())
    assert str(difference) == "BatchNorm2d momentum 0.01 in jax, 0.1 in torch, at (model)"


@pytest.mark.parametrize(
    ("asked", "products", "said"),
    [
        (None, "tf32", []),
        ("tensorfloat32", "tf32", []),
        (jax.lax.Precision.HIGHEST, "full", []),
        ("highest", "tf32", ["Linear precision full in jax, tf32 in torch, at (model)"]),
        ("high", "full", ["Linear precision tf32 in jax, full in torch, at (model)"]),
    ],
)
def test_a_module_told_another_precision_than_the_one_asked_for_is_named(
    asked: Any, products: Products, said: list[str]
) -> None:
    twins = torch.nn.Linear(4, 3), nnx.Linear(4, 3, precision=asked, rngs=rngs())
    assert [str(difference) for difference in differences(*twins, products)] == said


def facts_of(function: Any, x: np.ndarray) -> dict[str, Any]:
    def marked(x: jax.Array) -> Any:
        with jax_semantics.mark("a.b"):
            return function(x)

    facts: semantics.Attributes = {}
    jax_semantics.add_operations(jax.make_jaxpr(marked)(jnp.asarray(x)).jaxpr, facts)
    return facts.get("a.b", {})


@pytest.mark.parametrize(
    ("function", "form"),
    [
        (lambda x: nnx.gelu(x, approximate=False), "exact"),
        (nnx.gelu, "tanh"),
        (lambda x: x * nnx.sigmoid(1.702 * x), "x * sigmoid(c * x)"),
        (jax.jit(lambda x: nnx.gelu(x, approximate=False)), "exact"),
        (nnx.relu, None),
    ],
    ids=["exact", "tanh", "sigmoid", "exact inside jit", "none"],
)
def test_the_form_of_gelu_is_read_from_the_operations(function: Any, form: str | None) -> None:
    assert facts_of(function, np.ones((2, 3), np.float32)).get("GELU") == form


@pytest.mark.parametrize(("count", "divisor"), [(True, "whole window"), (False, "pixels inside")])
def test_the_divisor_of_a_pool_is_read_in_both(count: bool, divisor: str) -> None:
    pool = torch.nn.AvgPool2d(3, 2, 1, count_include_pad=count)
    facts: semantics.Attributes = {}
    with torch_semantics.listening(pool, facts):
        pool(torch.ones(1, 2, 8, 8))
    assert facts[""]["pool divisor"] == divisor

    def jax_pool(x: jax.Array) -> jax.Array:
        return linen.avg_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)), count_include_pad=count)

    assert facts_of(jax_pool, np.ones((1, 8, 8, 2), np.float32))["pool divisor"] == divisor


def test_what_an_activation_says_that_only_one_twin_has_as_a_module_counts_for_the_one_around_it() -> None:
    torch_facts = {"": {}, "mlp": {}, "mlp.act": {"GELU": "exact", "eps": 1.0}}
    jax_facts = {"": {}, "mlp": {"GELU": "tanh", "eps": 2.0}}
    found = semantics.differences(torch_facts, jax_facts, {"mlp": "Mlp"})
    assert [str(difference) for difference in found] == ["Mlp GELU tanh in jax, exact in torch, at mlp"]


def test_functions_that_a_torch_model_calls_are_heard() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.nn.functional.gelu(x, approximate="tanh")
            x = torch.nn.functional.layer_norm(x, (8,), eps=1e-3)
            return torch.nn.functional.interpolate(x, scale_factor=2.0, mode="bicubic")

    model, facts = Model(), {}
    with torch_semantics.listening(model, facts):
        model(torch.ones(1, 2, 8, 8))
    resizing = {"interpolation": "cubic, a = -0.75", "scale of resizing": 2.0}
    assert facts == {"": {"GELU": "tanh", "eps": 1e-3, **resizing}}


def evidence(said: list[Difference] | None = None, **known: Any) -> causes.Evidence:
    return causes.Evidence(**{"wrong": [], "suspects": [], "draws": {}, "weights": {}} | known, differences=said or [])


@pytest.mark.parametrize(
    ("fact", "dtype", "named"),
    [
        ("eps", "float64", True),
        ("momentum", "float64", False),
        ("dropout rate", "float32", False),
        ("variance", "float64", False),
        ("variance", "float32", True),
    ],
)
def test_what_cannot_have_made_a_module_wrong_is_not_named_as_the_cause(fact: str, dtype: str, named: bool) -> None:
    said = [Difference("norm", "BatchNorm2d", fact, "one", "other")]
    found = causes.explain(evidence(said, suspects=[Suspect("norm", "", dtype, "torch")]))
    assert found.path == "norm"
    assert (f"BatchNorm2d {fact} other in jax, one in torch" in str(found.cause)) is named


@pytest.mark.parametrize(("relative", "said"), [(1.2e-7, True), (1e-5, False), (1e-10, False)])
def test_a_module_that_differs_by_as_much_as_float32_rounds_is_said_to(relative: float, said: bool) -> None:
    row = Check("layers", "float64", "norm", "mismatch", 1e-12, relative, view="torch")
    found = causes.explain(evidence(wrong=[row], suspects=[Suspect("norm", "", "float64", "torch")]))
    assert ("as float32 inside" in str(found.cause)) is said


@pytest.mark.parametrize("longer", ["torch", "jax"])
def test_of_two_sequences_of_masks_the_longer_one_says_where_they_part(longer: str) -> None:
    last = Draw("head", (3, 4))
    draws = {"torch": [last], "jax": [last]} | {longer: [Draw("blocks.0", (3, 1)), last]}
    assert causes.explain(evidence(draws=draws)).path == "blocks.0"


def test_a_cause_of_many_differences_says_how_many_are_left_out() -> None:
    said = [Difference(f"blocks.{n}", "LayerNorm", "eps", 1e-5, 1e-6) for n in range(5)]
    found = causes.explain(causes.Evidence([], [], said, {"torch": {}, "jax": {}}, {}))
    assert found.path == "blocks.0"
    assert str(found.cause).count("LayerNorm eps") == 3
    assert str(found.cause).endswith("at blocks.2; … and 2 more")
