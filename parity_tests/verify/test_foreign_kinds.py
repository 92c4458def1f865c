"""Kinds of models that other packages have, as small as they get: what other tests of kinds do not hold.

RMSNorm in float32 with RoPE is in test_truth.py and support/decoder.py; scans, split heads and `nnx.Sequential` are in
test_mapping.py.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from outlook_parity import NameMap, Report, load_torch_weights, verify

pytestmark = pytest.mark.usefixtures("quick_compilation")

WIDTH = 6


# Linen modules whose `__call__` is a function of another name, or calls that of a class above.


def in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of another name, as decorators without `functools.wraps` do."""

    def cast(self: Any, x: Any) -> Any:
        return function(self, x).astype(x.dtype)

    return cast


class Decorated(linen.Module):
    eps: float

    @linen.compact
    @in_float32
    def __call__(self, x: Any) -> Any:
        scale = self.param("scale", linen.initializers.ones, (WIDTH,))
        return scale * x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)


class Above(linen.Module):
    eps: float

    @linen.compact
    def __call__(self, x: Any) -> Any:
        scale = self.param("scale", linen.initializers.ones, (WIDTH,))
        return scale * x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)


class Below(Above):
    def __call__(self, x: Any) -> Any:
        return super().__call__(x)


class Normed(linen.Module):
    norm: type[linen.Module]
    eps: float

    @linen.compact
    def __call__(self, x: Any) -> Any:
        y = linen.Dense(WIDTH, name="first")(x)
        return linen.Dense(WIDTH, name="last")(self.norm(self.eps, name="norm")(y))


class TorchNormed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = (
            torch.nn.Linear(WIDTH, WIDTH),
            torch.nn.RMSNorm(WIDTH, eps=1e-6),
            torch.nn.Linear(WIDTH, WIDTH),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(self.norm(self.first(x)))
        return y


@pytest.mark.parametrize("norm", [Decorated, Below], ids=["decorated", "inherited"])
def test_a_call_of_another_name_or_of_a_class_above_is_one_call_of_its_module(norm: type[linen.Module]) -> None:
    theirs, x = TorchNormed(), np.random.default_rng(0).standard_normal((3, WIDTH))

    def check(eps: float) -> Report:
        module = Normed(norm, eps)
        ours = load_torch_weights((module, module.init(jax.random.key(0), x)), theirs)
        return verify(theirs, ours, x, levels=("layers",), dtypes=("float64",))

    honest = check(1e-6)
    assert honest.verdict == "pass", str(honest)
    assert ("norm", "pass") in {(row.name, row.verdict) for row in honest.checks if row.view == "torch"}
    faulty = check(1e-2)
    assert (faulty.verdict, faulty.first_divergence) == ("mismatch", "norm")
    assert "eps 0.01 in jax, 1e-06 in torch" in str(faulty.cause)


# Activations of a class in one twin, and a mask in float32 whose numbers only float64 has.


class QuickGELU(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class TorchMasked(torch.nn.Module):
    """As in CLIP: the mask is made in float32, with the lowest number of the dtype computed in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act, self.last = torch.nn.Linear(WIDTH, WIDTH), QuickGELU(), torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.float32).triu(1)
        mask = hidden.masked_fill(hidden.bool(), torch.finfo(x.dtype).min).to(x.dtype)
        weights = (x @ x.mT + mask).softmax(-1)
        y: torch.Tensor = self.last(self.act(self.first(weights @ x)))
        return y


class Masked(nnx.Module):
    def __init__(self, activation: Callable[[Any], Any]) -> None:
        self.first, self.last = (nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0)) for _ in range(2))
        self.activation = activation

    def __call__(self, x: Any) -> Any:
        hidden = jnp.triu(jnp.ones((x.shape[1], x.shape[1])), 1)
        mask = jnp.where(hidden > 0, jnp.finfo(x.dtype).min, 0.0).astype(x.dtype)
        weights = jax.nn.softmax(x @ x.swapaxes(-1, -2) + mask)
        return self.last(self.activation(self.first(weights @ x)))


def test_operations_are_told_where_float64_runs_by_lifted_casts_alone() -> None:
    theirs, x = TorchMasked(), np.random.default_rng(0).standard_normal((2, 5, WIDTH))
    faulty = load_torch_weights(Masked(lambda x: jax.nn.gelu(x, approximate=False)), theirs)
    report = verify(theirs, faulty, x, levels=("forward", "layers"), dtypes=("float64",))
    assert not [note for note in report.notes if "could not be traced" in note]
    assert "activation GELU (exact) in jax, GELU (quick: x * sigmoid(1.702 x)) in torch" in str(report.cause)
    honest = load_torch_weights(Masked(lambda x: x * jax.nn.sigmoid(1.702 * x)), theirs)
    assert verify(theirs, honest, x, levels=("forward", "layers"), dtypes=("float64",)).verdict == "pass"


# A BatchNorm that is not told the mode.


class TorchTwoNorms(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = torch.nn.Linear(WIDTH, WIDTH), torch.nn.BatchNorm1d(WIDTH)
        self.second, self.last = torch.nn.BatchNorm1d(WIDTH), torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(self.second(self.norm(self.first(x)).square()))
        return y


class TwoNorms(nnx.Module):
    def __init__(self, told: bool) -> None:
        rngs = nnx.Rngs(0)
        self.first, self.last = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm, self.second = (
            nnx.BatchNorm(WIDTH, momentum=0.9, epsilon=1e-5, use_fast_variance=False, rngs=rngs) for _ in range(2)
        )
        self.told = told

    def __call__(self, x: Any) -> Any:
        y = self.norm(self.first(x)) ** 2
        return self.last(self.second(y) if self.told else self.second(y, use_running_average=True))


@pytest.mark.parametrize("told", [True, False])
def test_a_batch_norm_that_stays_in_eval_mode_is_placed(told: bool) -> None:
    theirs, x = TorchTwoNorms(), np.random.default_rng(0).standard_normal((6, WIDTH))
    report = verify(theirs, load_torch_weights(TwoNorms(told), theirs), x, levels=("training",), dtypes=("float64",))
    words = "of second stay as they were in jax: BatchNorm there computes with them in training, as in eval mode"
    assert (words in str(report.cause)) != told
    assert report.first_divergence == ("norm" if told else "second")  # Flax keeps the biased variance


# Results that are the same for all samples: of one sample in one twin, repeated in the other.


class TorchPositions(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.positions, self.types = torch.nn.Embedding(5, WIDTH), torch.nn.Embedding(2, WIDTH)
        self.last = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + self.positions(torch.arange(5)[None]) + self.types(torch.zeros(x.shape[:2], dtype=torch.long))
        z: torch.Tensor = self.last(y)
        return z


class Positions(nnx.Module):
    def __init__(self, type_: int, shift: int) -> None:
        rngs = nnx.Rngs(0)
        self.positions, self.types = nnx.Embed(5, WIDTH, rngs=rngs), nnx.Embed(2, WIDTH, rngs=rngs)
        self.last, self.type, self.shift = nnx.Linear(WIDTH, WIDTH, rngs=rngs), type_, shift

    def __call__(self, x: Any) -> Any:
        positions = (jnp.arange(5) + self.shift) % 5
        y = x + self.positions(jnp.broadcast_to(positions, x.shape[:2]))
        return self.last(y + self.types(jnp.full(x.shape[:2], self.type)))


@pytest.mark.parametrize(("type_", "shift", "table"), [(0, 0, ""), (1, 0, "types"), (0, 1, "positions")])
def test_results_of_one_sample_are_compared_with_those_that_are_repeated(type_: int, shift: int, table: str) -> None:
    theirs, x = TorchPositions(), np.random.default_rng(0).standard_normal((3, 5, WIDTH))
    ours = load_torch_weights(Positions(type_, shift), theirs)
    report = verify(theirs, ours, x, levels=("layers",), dtypes=("float64",))
    assert report.verdict == ("mismatch" if table else "pass"), str(report)
    assert not table or f"calls {table} with other integers" in str(report.cause)
    rows = {(row.name, row.view): row.verdict for row in report.checks}
    assert rows["positions", "propagated"] == ("mismatch" if table == "positions" else "pass")


# Maps that are resized.


class TorchResized(torch.nn.Module):
    def __init__(self, resize: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.resize, self.last = torch.nn.Conv2d(3, 4, 1), resize, torch.nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(self.resize(self.first(x)))
        return y


class Resized(nnx.Module):
    def __init__(self, resize: Callable[[Any], Any]) -> None:
        rngs = nnx.Rngs(0)
        self.first, self.last = nnx.Conv(3, 4, (1, 1), rngs=rngs), nnx.Conv(4, 2, (1, 1), rngs=rngs)
        self.resize = resize

    def __call__(self, x: Any) -> Any:
        return self.last(self.resize(self.first(x)))


def interpolate(size: tuple[int, int], **options: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: torch.nn.functional.interpolate(input=x, size=size, **options)


def resize(size: tuple[int, int], method: str, **options: Any) -> Callable[[Any], Any]:
    return lambda x: jax.image.resize(x, (x.shape[0], *size, x.shape[3]), method, **options)


def translate(size: tuple[int, int], scale: tuple[float, float], method: str) -> Callable[[Any], Any]:
    def call(x: Any) -> Any:
        shape, zero = (x.shape[0], *size, x.shape[3]), jnp.zeros(2)
        return jax.image.scale_and_translate(x, shape, (1, 2), jnp.asarray(scale), zero, method, antialias=False)

    return call


LARGER, SMALLER = (8, 12), (3, 4)

# How PyTorch resizes a map of 6 x 8, how JAX does, and what the cause says; "" where they are the same.
RESIZED: dict[str, tuple[Any, Any, str]] = {
    "linear, larger": (interpolate(LARGER, mode="bilinear"), resize(LARGER, "bilinear"), ""),
    "linear, smaller": (interpolate(SMALLER, mode="bilinear"), resize(SMALLER, "linear", antialias=False), ""),
    "cubic as PyTorch's": (
        interpolate(LARGER, mode="bicubic"),
        resize(LARGER, "cubic-pytorch", antialias=False),
        "",
    ),
    "antialiased": (
        interpolate(SMALLER, mode="bilinear"),
        resize(SMALLER, "bilinear"),
        "interpolation linear, with antialiasing in jax, linear, without antialiasing in torch",
    ),
    "cubic": (
        interpolate(LARGER, mode="bicubic"),
        resize(LARGER, "bicubic"),
        "interpolation cubic, a = -0.5 in jax, cubic, a = -0.75 in torch",
    ),
    "corners": (
        interpolate(LARGER, mode="bilinear", align_corners=True),
        resize(LARGER, "bilinear"),
        "interpolation linear in jax, linear, corners aligned in torch",
    ),
    "another scale": (
        interpolate(LARGER, mode="bilinear"),
        translate(LARGER, (8.1 / 6, 12.1 / 8), "linear"),
        "scale of resizing (1.35, 1.5125) in jax, (1.33333, 1.5) in torch",
    ),
}


@pytest.mark.parametrize("name", RESIZED)
def test_how_a_map_is_resized_is_compared_and_named(name: str) -> None:
    theirs, ours, words = RESIZED[name]
    module, names = TorchResized(theirs), NameMap(torch_axes=(0, 3, 1, 2))
    images = np.random.default_rng(0).standard_normal((2, 6, 8, 3))
    port = load_torch_weights(Resized(ours), module, names)
    report = verify(module, port, images, levels=("forward", "layers"), dtypes=("float64",), names=names)
    assert report.verdict == ("mismatch" if words else "pass"), str(report)
    assert (words in str(report.cause)) if words else not report.differences
