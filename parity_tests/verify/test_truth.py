"""Models that cast to float32 themselves: float64 is the truth for them too, and hides no fault."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from outlook_parity import Report, load_torch_weights, verify
from outlook_parity.backends.jax.settings import jax_device
from outlook_parity.backends.jax.settings import pinned as jax_pinned
from outlook_parity.backends.jax.truth import lifted as jax_lifted
from outlook_parity.backends.torch.truth import lifted as torch_lifted
from outlook_parity.compare.modules import Suspect
from outlook_parity.compare.ranking import ranked
from outlook_parity.compare.residue import excuse
from outlook_parity.core.check import Check
from outlook_parity.core.truth import Truth

pytestmark = pytest.mark.usefixtures("quick_compilation")

WIDTH, HEADS, LENGTH, BASE = 16, 2, 5, 10000.0


def angles(base: float) -> np.ndarray:
    """Return the angles of rotary embeddings in float32, as both twins keep them."""
    frequencies = base ** -(np.arange(0, WIDTH // HEADS, 2) / (WIDTH // HEADS))
    return np.outer(np.arange(LENGTH), frequencies).astype(np.float32)


class TorchNorm(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(1 + 0.1 * torch.randn(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        return self.weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class TorchAttention(torch.nn.Module):
    """Attention with rotary embeddings, whose softmax is in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (torch.nn.Linear(WIDTH, WIDTH) for _ in range(4))
        frequencies = torch.tensor(BASE) ** -(torch.arange(0, WIDTH // HEADS, 2) / (WIDTH // HEADS))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        turns = torch.arange(LENGTH).float()[:, None] * self.frequencies.float()
        cos, sin = turns.cos().to(x.dtype), turns.sin().to(x.dtype)
        q, k = (torch.cat([a * cos - b * sin, a * sin + b * cos], -1) for a, b in (q.chunk(2, -1), k.chunk(2, -1)))
        logits = q @ k.transpose(-1, -2) * (WIDTH // HEADS) ** -0.5
        weights = torch.nn.functional.softmax(logits, dim=-1, dtype=torch.float32).to(x.dtype)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


class TorchModel(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.head = TorchNorm(), TorchAttention(), torch.nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.attention(self.norm(x)))


class Norm(nnx.Module):
    def __init__(self, epsilon: float) -> None:
        self.weight, self.epsilon = nnx.Param(jnp.ones(WIDTH)), epsilon

    def __call__(self, x: Any) -> Any:
        y = jnp.asarray(x, jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        return self.weight * y.astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, base: float) -> None:
        linear = partial(nnx.Linear, WIDTH, WIDTH, rngs=nnx.Rngs(0))
        self.q, self.k, self.v, self.o, self.base = linear(), linear(), linear(), linear(), base

    def __call__(self, x: Any) -> Any:
        q, k, v = (part(x).reshape(*x.shape[:2], HEADS, -1).swapaxes(1, 2) for part in (self.q, self.k, self.v))
        turns = jnp.asarray(angles(self.base))
        cos, sin = jnp.cos(turns).astype(x.dtype), jnp.sin(turns).astype(x.dtype)
        halves = (jnp.split(part, 2, -1) for part in (q, k))
        q, k = (jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1) for a, b in halves)
        logits = (q @ k.swapaxes(-1, -2) * (WIDTH // HEADS) ** -0.5).astype(jnp.float32)
        weights = jax.nn.softmax(logits, axis=-1).astype(x.dtype)
        return self.o((weights @ v).swapaxes(1, 2).reshape(x.shape))


class Model(nnx.Module):
    def __init__(self, *, base: float = BASE, epsilon: float = 1e-6) -> None:
        self.norm, self.attention = Norm(epsilon), Attention(base)
        self.head = nnx.Linear(WIDTH, 3, rngs=nnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        return self.head(x + self.attention(self.norm(x)))


def torch_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return TorchModel()


def jax_model(**fault: float) -> Any:
    return load_torch_weights(Model(**fault), torch_model())


def check(*levels: str, dtypes: tuple[str, ...] = ("float64", "float32"), **fault: float) -> Report:
    x = np.random.default_rng(0).standard_normal((2, LENGTH, WIDTH))
    return verify(torch_model(), jax_model(**fault), x, levels=levels or None, dtypes=dtypes)


def test_twins_that_cast_alike_pass_and_what_their_tables_make_is_a_note() -> None:
    report = check("forward", "layers", "gradients", "training")
    assert report.verdict == "pass", str(report)
    (note,) = report.notes
    assert "as float32 constants make it: frequencies of shape (4,) in attention (torch)" in note
    assert "a constant of shape (5, 4) in attention (jax)" in note
    rows = [row for row in report.checks if (row.level, row.dtype, row.view) == ("layers", "float64", "torch")]
    assert all((row.measured or 0.0) < 1e-14 for row in rows if row.name == "norm")  # the cast is lifted
    assert 1e-9 < max(row.measured or 0 for row in report.checks if row.excused) < 1e-5


def test_without_float32_nothing_shows_that_a_difference_is_its_rounding() -> None:
    report = check("forward", "layers", dtypes=("float64",))
    assert (report.verdict, report.first_divergence) == ("mismatch", "attention")


def test_a_fault_beside_casts_is_named_and_no_norm() -> None:
    report = check("forward", "layers", base=5000.0)
    assert (report.verdict, report.first_divergence) == ("mismatch", "attention")


def test_a_fault_as_small_as_float32_rounds_is_no_note_in_a_module_without_constants() -> None:
    report = check("forward", "layers", epsilon=2e-6)
    assert (report.verdict, report.first_divergence) == ("mismatch", "norm")


class TorchScaled(torch.nn.Module):
    """A residual branch that is scaled by a number, as those of stochastic depth."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.rate = torch.nn.Linear(WIDTH, WIDTH), rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.linear(x) / (1 - self.rate)
        return y


class Scaled(nnx.Module):
    def __init__(self) -> None:
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        return x + self.linear(x) / (1 - 0.1)


@pytest.mark.parametrize(
    ("rate", "verdict"), [(torch.linspace(0, 0.1, 2)[1].item(), "pass"), (0.1 + 1.5e-9, "mismatch"), (0.1, "pass")]
)
def test_a_number_of_float32_in_a_module_is_a_constant_of_float32(rate: float, verdict: str) -> None:
    module, x = TorchScaled(rate), np.random.default_rng(0).standard_normal((4, WIDTH))
    report = verify(module, load_torch_weights(Scaled(), module), x, levels=("forward", "training"))
    assert report.verdict == verdict, str(report)
    assert any("rate of shape () (torch)" in note for note in report.notes) == (verdict == "pass" and rate != 0.1)


def _torch_casts() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    f32 = torch.float32
    return {
        "float": lambda x: x.float(),
        "to": lambda x: x.to(f32),
        "to of a tensor": lambda x: x.to(torch.zeros(1, dtype=f32)),
        "type": lambda x: x.type(f32),
        "softmax": lambda x: x.softmax(-1, dtype=f32),
        "functional": lambda x: torch.nn.functional.softmax(x, -1, dtype=f32),
        "sum": lambda x: x.sum(dtype=f32),
        "tensor": lambda x: torch.tensor(0.1, dtype=f32),
        "arange": lambda x: torch.arange(3, dtype=f32) / 3,
        "full": lambda x: torch.full((2,), 0.1, dtype=f32),
        "default": lambda x: torch.full((2,), 0.1),
        "product": lambda x: torch.full((2, 4), 0.1, dtype=f32) @ x.new_ones(4, 1),
    }


@pytest.mark.parametrize("name", _torch_casts())
def test_pytorch_keeps_float64_where_float32_is_asked_for(name: str) -> None:
    x = torch.rand(4, dtype=torch.float64)
    with torch_lifted(torch.nn.Identity(), Truth()):
        result = _torch_casts()[name](x)
        assert _torch_casts()["float"](x).half().dtype == torch.float16
    assert result.dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32
    if name in ("float", "to", "type"):
        assert torch.equal(result, x)
    if name in ("tensor", "full", "default"):
        assert float(result.flatten()[0]) == 0.1


def test_pytorch_lifts_casts_of_backward_passes_too() -> None:
    class Cast(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return gradient.float().to(gradient.dtype)

    x = torch.rand(4, dtype=torch.float64, requires_grad=True)
    cotangent, truth = torch.rand(4, dtype=torch.float64), Truth()
    with torch_lifted(torch.nn.Identity(), truth):
        (gradient,) = torch.autograd.grad(Cast.apply(x), x, cotangent)
    assert torch.equal(gradient, cotangent)
    assert truth.lifted


@jax.custom_jvp
def _cast(x: Any) -> Any:
    return x.astype(jnp.float32).astype(x.dtype)


@_cast.defjvp
def _cast_jvp(primals: Any, tangents: Any) -> Any:
    return _cast(*primals), tangents[0].astype(jnp.float32).astype(tangents[0].dtype)


def _loop(x: Any) -> Any:
    return jax.lax.scan(lambda carry, _: (carry.astype(jnp.float32) + x, None), x, None, length=1)[0] - x


JAX_CASTS: dict[str, Callable[[Any], Any]] = {
    "astype": lambda x: x.astype(jnp.float32).astype(x.dtype),
    "asarray": lambda x: jnp.asarray(x, jnp.float32),
    "jit": jax.jit(lambda x: x.astype(jnp.float32)),
    "remat": jax.checkpoint(lambda x: x.astype(jnp.float32)),
    "custom_jvp": _cast,
    "scan": _loop,
    "cond": lambda x: jax.lax.cond(x[0] < 2, lambda: x.astype(jnp.float32), lambda: jnp.zeros(4, jnp.float32)),
    "precision": lambda x: jax.lax.reduce_precision(x, 8, 23),
    "product": lambda x: jnp.matmul(jnp.eye(4, dtype=jnp.float32), x, preferred_element_type=jnp.float32),
    "scalar": lambda x: x - x + jnp.asarray(0.1, jnp.float32) - 0.1 + x,
    "sum": lambda x: jnp.stack([x, 0 * x]).sum(0, dtype=jnp.float32),
}


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", JAX_CASTS)
def test_jax_keeps_float64_where_float32_is_asked_for(name: str, jitted: bool) -> None:
    function = jax.jit(lambda x: JAX_CASTS[name](x)) if jitted else JAX_CASTS[name]
    numbers, truth = np.random.default_rng(0).random(4), Truth()
    with jax_pinned("float64", jax_device("cpu")):
        x = jnp.asarray(numbers)
        before = np.asarray(JAX_CASTS["jit"](x))  # traced first without the lift
        with jax_lifted(truth):
            result = function(x)
            gradient = jax.grad(lambda x: (function(x).astype(x.dtype) * numbers).sum())(x)
        after = np.asarray(JAX_CASTS["jit"](x))
    assert result.dtype == np.float64
    assert np.abs(result - numbers).max() < 1e-15
    assert np.abs(gradient - numbers).max() < 1e-15
    assert truth.lifted or name != "astype"
    assert before.dtype == after.dtype == np.float32


def test_casts_to_half_precision_stay() -> None:
    with jax_pinned("float64", jax_device("cpu")), jax_lifted(Truth()):
        assert jnp.asarray(np.ones(3)).astype(jnp.bfloat16).dtype == jnp.bfloat16


def test_a_model_that_needs_its_float32_runs_as_it_is_and_a_note_says_so() -> None:
    def picky(x: Any) -> Any:
        y = x.astype(jnp.float32)
        assert y.dtype == jnp.float32, "float32 only"
        return y.astype(x.dtype) * 2

    x = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    report = verify(lambda x: 2 * x, picky, x, levels=("forward",), dtypes=("float64",))
    assert any("lifted to float64 it fails (AssertionError: float32 only)" in note for note in report.notes)


class Picky(nnx.Module):
    def __init__(self) -> None:
        self.linear = nnx.Linear(3, 3, rngs=nnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        y = self.linear(x).astype(jnp.float32)
        assert y.dtype == jnp.float32, "float32 only"
        return y.astype(x.dtype)


class Rounding(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y.to(x.dtype)


@pytest.mark.parametrize("levels", [("layers",), ("training",)], ids=str)
def test_every_level_runs_a_model_that_needs_its_float32_as_it_is(levels: tuple[str, ...]) -> None:
    module = Rounding()
    x = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    report = verify(module, load_torch_weights(Picky(), module), x, levels=levels, dtypes=("float64",))
    assert any("lifted to float64 it fails (AssertionError: float32 only)" in note for note in report.notes)


def _row(level: str, dtype: str, verdict: Any, measured: float, **fields: Any) -> Check:
    return Check(level, dtype, "output", verdict, 1e-12, measured, **fields)


TABLE = {"torch": Truth(), "jax": Truth(constants={"rope": {"a constant"}})}


@pytest.mark.parametrize(
    ("measured", "below", "truths", "excused"),
    [
        (1e-7, "pass", TABLE, True),
        (1e-5, "pass", TABLE, False),  # more than 64 units
        (1e-7, "mismatch", TABLE, False),
        (1e-7, "pass", {"torch": Truth(), "jax": Truth()}, False),  # no constants
    ],
)
def test_only_what_float32_constants_explain_is_excused(
    measured: float, below: Any, truths: dict[str, Truth], excused: bool
) -> None:
    rows = [_row("forward", "float64", "mismatch", measured), _row("forward", "float32", below, 1.0)]
    assert excuse(rows, [], truths).checks[0].excused is excused


@pytest.mark.parametrize(
    ("values", "rounded"),
    [
        (np.cos(np.arange(4.0)), True),
        (np.float32(0.1), True),
        (np.exp(1j * np.arange(3.0)).astype(np.complex64), True),
        (np.arange(100000.0), False),
        ([-1e9, np.finfo(np.float32).min, -np.inf, np.nan], False),
        ([0.5, 0.0625, -1.75], False),
        ([], False),
    ],
)
def test_only_fractions_that_float32_rounds_count_as_constants(values: Any, rounded: bool) -> None:
    array = np.asarray(values)
    truth = Truth()
    truth.saw_constant("rope", array if array.dtype.kind == "c" else array.astype(np.float32))
    truth.saw_constant("rope", np.cos(np.arange(4.0)))  # in float64
    assert bool(truth.constants) is rounded


def suspect(path: str, error: float) -> Suspect:
    return Suspect(path, "", "float64", "torch", error=error)


def test_the_first_suspect_is_the_first_of_those_that_contribute() -> None:
    effects = {"early": 1e-9, "fault": 0.1, "later": 0.2, "rounding": 1.0}
    suspects = [suspect("rounding", 1e-7), suspect("early", 0.02), suspect("fault", 0.1), suspect("later", 0.3)]
    order = [one.path for one in ranked(suspects, lambda same: effects[same[0].path])]
    assert order == ["fault", "later", "early", "rounding"]
    assert [one.path for one in ranked(suspects[:1], lambda same: None)] == ["rounding"]
