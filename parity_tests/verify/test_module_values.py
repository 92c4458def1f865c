"""Twins whose modules hand each other what is no floating-point number, or draw their lines elsewhere."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from outlook_parity import Report, load_torch_weights, verify
from outlook_parity.compare.modules import MODEL
from outlook_parity.compare.patterns import how_they_differ
from outlook_parity.compare.tensors import compare_level
from parity_tests.support.small_volo import quick_compilation, wrong

__all__ = ["quick_compilation"]  # a fixture

WIDTH = 4
LEVELS = ("forward", "layers", "gradients")

Change = Callable[[Any], Any]


def same(x: Any) -> Any:
    return x


def check(theirs: torch.nn.Module, ours: nnx.Module, shape: tuple[int, ...], **options: Any) -> Report:
    inputs = np.random.default_rng(0).standard_normal(shape)
    options = {"levels": LEVELS, "dtypes": ("float64", "float32")} | options
    return verify(theirs, load_torch_weights(ours, theirs), inputs, **options)


class TorchSpectrum(torch.nn.Module):
    def __init__(self, change: Change) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.change(torch.fft.rfft(x, dim=1))


class TorchMix(torch.nn.Module):
    def __init__(self, change: Change) -> None:
        super().__init__()
        self.real, self.imag = (torch.nn.Parameter(torch.randn(WIDTH)) for _ in range(2))
        self.change = change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.change(torch.complex(self.real, self.imag))


class TorchFourier(torch.nn.Module):
    def __init__(self, spectrum: Change = same, mix: Change = same) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spectrum, self.mix = TorchSpectrum(spectrum), TorchMix(mix)
        self.head = torch.nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.fft.irfft(self.mix(self.spectrum(x)), n=x.shape[1], dim=1))


class JaxSpectrum(nnx.Module):
    def __init__(self, change: Change) -> None:
        self.change = change

    def __call__(self, x: Any) -> Any:
        return self.change(jnp.fft.rfft(x, axis=1))


class JaxMix(nnx.Module):
    def __init__(self, change: Change) -> None:
        self.real, self.imag = (nnx.Param(jnp.zeros(WIDTH)) for _ in range(2))
        self.change = change

    def __call__(self, x: Any) -> Any:
        return x * self.change(jax.lax.complex(self.real[...], self.imag[...]))


class JaxFourier(nnx.Module):
    def __init__(self, spectrum: Change = same, mix: Change = same) -> None:
        self.spectrum, self.mix = JaxSpectrum(spectrum), JaxMix(mix)
        self.head = nnx.Linear(WIDTH, 2, rngs=nnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        return self.head(jnp.fft.irfft(self.mix(self.spectrum(x)), n=x.shape[1], axis=1))


def conjugate(x: Any) -> Any:
    return x.conj()


def test_complex_numbers_may_go_from_module_to_module() -> None:
    report = check(TorchFourier(), JaxFourier(), (2, 6, WIDTH))
    assert report.verdict == "pass", str(report)
    assert {"spectrum", "mix"} <= {row.name for row in report.checks if row.verdict == "pass"}


@pytest.mark.parametrize("path", ["spectrum", "mix"])
@pytest.mark.parametrize("twin", ["torch", "jax"])
def test_a_module_that_gives_wrong_complex_numbers_is_found(path: str, twin: str) -> None:
    theirs = TorchFourier(**{path: conjugate} if twin == "torch" else {})
    ours = JaxFourier(**{path: conjugate} if twin == "jax" else {})
    assert check(theirs, ours, (2, 6, WIDTH), dtypes=("float64",)).first_divergence == path


def test_complex_weights_are_an_error_that_says_what_to_do() -> None:
    class Complex(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4, dtype=torch.complex64))

    with pytest.raises(TypeError, match="weight of the torch model is complex; keep its real and imaginary parts"):
        load_torch_weights(JaxMix(same), Complex())


class TorchRouter(torch.nn.Module):
    def __init__(self, change: Change) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(WIDTH, 3)
        self.change = change

    def forward(self, x: torch.Tensor) -> Any:
        weights, chosen = self.gate(x).softmax(-1).topk(2, -1)
        return weights, self.change(chosen)


class TorchBuckets(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x > 0).sum(-1)


class TorchRouted(torch.nn.Module):
    def __init__(self, change: Change = same) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router, self.buckets = TorchRouter(change), TorchBuckets()
        self.experts = torch.nn.ModuleList([torch.nn.Linear(WIDTH, WIDTH) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.router(x)
        parts = [(weights * (chosen == n)).sum(-1, keepdim=True) * e(x) for n, e in enumerate(self.experts)]
        return sum(parts) * self.buckets(x)[..., None]


class JaxRouter(nnx.Module):
    def __init__(self, change: Change, rngs: nnx.Rngs) -> None:
        self.gate = nnx.Linear(WIDTH, 3, rngs=rngs)
        self.change = change

    def __call__(self, x: Any) -> Any:
        weights, chosen = jax.lax.top_k(jax.nn.softmax(self.gate(x), -1), 2)
        return weights, self.change(chosen)


class JaxBuckets(nnx.Module):
    def __call__(self, x: Any) -> Any:
        return (x > 0).sum(-1)


class JaxRouted(nnx.Module):
    def __init__(self, change: Change = same) -> None:
        rngs = nnx.Rngs(0)
        self.router, self.buckets = JaxRouter(change, rngs), JaxBuckets()
        self.experts = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(3)])

    def __call__(self, x: Any) -> Any:
        weights, chosen = self.router(x)
        parts = [(weights * (chosen == n)).sum(-1, keepdims=True) * e(x) for n, e in enumerate(self.experts)]
        return sum(parts) * self.buckets(x)[..., None]


def test_modules_that_give_whole_numbers_alone_or_among_others_pass() -> None:
    report = check(TorchRouted(), JaxRouted(), (3, 5, WIDTH))
    assert report.verdict == "pass", str(report)


@pytest.mark.parametrize("twin", ["torch", "jax"])
def test_a_module_whose_whole_numbers_are_wrong_is_found(twin: str) -> None:
    theirs = TorchRouted(lambda chosen: chosen.flip(-1)) if twin == "torch" else TorchRouted()
    ours = JaxRouted(lambda chosen: chosen[..., ::-1]) if twin == "jax" else JaxRouted()
    assert check(theirs, ours, (3, 5, WIDTH), dtypes=("float64",)).first_divergence == "router"


class TorchCausal(torch.nn.Module):
    """Pads both ends and drops the end, as many do in PyTorch; `late` drops the beginning."""

    def __init__(self, *, late: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.late = torch.nn.Conv1d(WIDTH, WIDTH, 3, padding=2), late
        self.head = torch.nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x.transpose(1, 2))
        return self.head((y[..., 2:] if self.late else y[..., :-2]).transpose(1, 2))


class JaxCausal(nnx.Module):
    def __init__(self) -> None:
        self.conv = nnx.Conv(WIDTH, WIDTH, (3,), padding="CAUSAL", rngs=nnx.Rngs(0))
        self.head = nnx.Linear(WIDTH, 2, rngs=nnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        return self.head(self.conv(x))


def test_a_shape_that_the_module_around_makes_up_for_is_no_mismatch() -> None:
    report = check(TorchCausal(), JaxCausal(), (2, 7, WIDTH))
    assert report.verdict == "pass", str(report)
    rows = {(row.verdict, row.note) for row in report.checks if row.level == "layers" and row.name == "conv"}
    assert {verdict for verdict, _ in rows} == {"skipped"}
    assert all("what is made of it agrees" in note for _, note in rows)


def test_a_shape_that_nothing_makes_up_for_is_one() -> None:
    report = check(TorchCausal(late=True), JaxCausal(), (2, 7, WIDTH), dtypes=("float64",))
    assert report.first_divergence == "conv"
    assert "conv" in wrong(report)


class TorchInPlace(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = torch.nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.sub_(x.mean(1, keepdim=True)).mul_(2))


class JaxCentred(nnx.Module):
    def __init__(self) -> None:
        self.head = nnx.Linear(WIDTH, 2, rngs=nnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        return self.head(2 * (x - x.mean(1, keepdims=True)))


def test_a_model_may_change_its_inputs_in_place() -> None:
    report = check(TorchInPlace(), JaxCentred(), (3, 5, WIDTH), levels=None, dtypes=("float64",), steps=2)
    assert report.verdict == "pass", str(report)


def test_arrays_that_are_equal_differ_in_no_way_even_if_they_are_symmetric() -> None:
    constant = np.tile(np.arange(1.0, 7.0), (4, 1))
    assert how_they_differ(constant, constant.copy()) == ""
    assert how_they_differ(constant, constant * (1 + 1e-9 * np.arange(1, 7))) == ""
    assert "reversed" in how_they_differ(constant, constant[:, ::-1])


def test_of_two_outputs_of_which_one_is_right_the_wrong_one_tells_the_cause() -> None:
    class Torch(TorchInPlace):
        def forward(self, x: torch.Tensor) -> Any:
            return {"a": self.head(x[:, :1] * 0 + 1), "b": x.exp()}

    class Jax(JaxCentred):
        def __call__(self, x: Any) -> Any:
            return {"a": self.head(x[:, :1] * 0 + 1), "b": 3 * jnp.exp(x)}

    report = check(Torch(), Jax(), (4, 5, WIDTH), dtypes=("float64",))
    assert (report.first_divergence, report.cause) == (MODEL, f"{MODEL}: jax has 3 times what torch has")


@pytest.mark.parametrize(("ratio", "verdict"), [(4.0, "pass"), (30.0, "mismatch")])
def test_a_second_moment_of_nothing_but_rounding_is_compared_as_the_gradient_that_it_is_the_square_of(
    ratio: float, verdict: str
) -> None:
    noise = 1e-8 * np.random.default_rng(0).random(64)
    traced = {"torch": (ratio * noise) ** 2, "jax": noise**2, "truth": 1e-34 * np.ones(64)}
    name = "AdamW: second moment of attn.k.bias"
    (row,) = compare_level("training", "float32", {twin: {name: array} for twin, array in traced.items()}, (1, 1))
    assert row.verdict == verdict
    assert row.measured == pytest.approx(ratio, rel=1e-3)
