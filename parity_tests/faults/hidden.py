"""Faults that hide: exact on the inputs given, cancelled by another, in training or in gradients alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from outlook_parity import NameMap, Report, load_torch_weights, verify
from outlook_parity.compare.modules import MODEL
from parity_tests.faults.fault import TWINS, Fault

WIDTH = 6


class TorchModel(torch.nn.Module):
    """What the twins below are made from: each overrides a method, which is the fault."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = (
            torch.nn.Linear(4, WIDTH),
            torch.nn.LayerNorm(WIDTH),
            torch.nn.Linear(WIDTH, WIDTH),
        )
        self.bn = torch.nn.BatchNorm1d(WIDTH, eps=1e-3)
        self.head = torch.nn.Linear(WIDTH, WIDTH)

    def before(self, x: Any) -> Any:
        return x

    def middle(self, x: Any) -> Any:
        return x

    def act(self, x: Any) -> Any:
        return x.relu()

    def after(self, x: Any, out: Any) -> Any:
        return out

    def forward(self, x: Any, keep: Any) -> Any:
        y = self.norm(self.fc1(self.before(x)))
        y = self.act(self.fc2(self.middle(y)))
        out = self.head(self.bn(y) * self.kept(keep))
        return self.after(x, {"out": out, "best": self.best(out)})

    def kept(self, keep: Any) -> Any:
        return keep[:, None]

    def best(self, out: Any) -> Any:
        return out.argmax(-1)


class JaxModel(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.fc1, self.fc2, self.head = (nnx.Linear(n, WIDTH, rngs=rngs) for n in (4, WIDTH, WIDTH))
        self.norm = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)
        self.bn = nnx.BatchNorm(WIDTH, momentum=0.9, epsilon=1e-3, use_fast_variance=False, rngs=rngs)

    before, middle, after, kept, best = (
        TorchModel.before,
        TorchModel.middle,
        TorchModel.after,
        TorchModel.kept,
        TorchModel.best,
    )

    def act(self, x: Any) -> Any:
        return jax.nn.relu(x)

    __call__ = TorchModel.forward


Fields = dict[str, Any]
Build = Callable[[], Fields]


def _both(**methods: Any) -> tuple[Build, Build]:
    return lambda: methods, lambda: methods


@torch.autograd.function.once_differentiable
def _backward(ctx: Any, gradient: Any) -> Any:
    return 1.001 * gradient


class _TorchWrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x.clone()

    backward = staticmethod(_backward)


@jax.custom_vjp
def _jax_wrong_gradient(x: Any) -> Any:
    return x


_jax_wrong_gradient.defvjp(lambda x: (x, None), lambda _, gradient: (1.001 * gradient,))


def _counting() -> Fields:
    def after(self: Any, x: Any, out: Any) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        return out | {"out": out["out"] * self.calls}

    return {"after": after}


class Calls(nnx.Variable):
    """How often the model was called."""


def _counting_jax() -> Fields:
    def after(self: Any, x: Any, out: Any) -> Any:
        self.calls[...] += 1
        return out | {"out": out["out"] * self.calls[...]}

    return {"after": after, "setup": lambda self: setattr(self, "calls", Calls(jnp.zeros(())))}


def _remembering() -> Fields:
    """Gives what was computed first, whatever it is called with later."""

    def after(self: Any, x: Any, out: Any) -> Any:
        self.first = getattr(self, "first", None) or {name: tensor.detach() for name, tensor in out.items()}
        return self.first if not torch.is_grad_enabled() else out

    return {"after": after}


def _remembering_jax() -> Fields:
    def after(self: Any, x: Any, out: Any) -> Any:
        first = jnp.where(self.calls[...] == 0, out["out"], self.first[...])
        self.calls[...] += 1
        self.first[...] = first
        return out | {"out": first}

    def setup(self: Any) -> None:
        self.calls, self.first = Calls(jnp.zeros(())), Calls(jnp.zeros((5, WIDTH)))

    return {"after": after, "setup": setup}


def _random() -> Fields:
    return {"after": lambda self, x, out: out | {"out": out["out"] + 1e-3 * torch.randn_like(out["out"])}}


def _random_jax() -> Fields:
    def after(self: Any, x: Any, out: Any) -> Any:
        self.calls[...] += 1
        noise = jax.random.normal(jax.random.key(self.calls[...].astype(int)), out["out"].shape)
        return out | {"out": out["out"] + 1e-3 * noise.astype(out["out"].dtype)}

    return {"after": after, "setup": lambda self: setattr(self, "calls", Calls(jnp.zeros(())))}


def _when_training(self: Any, x: Any) -> Any:
    training = self.training if isinstance(self, TorchModel) else not self.bn.use_running_average
    return 1.001 * x if training else x


def _in_bfloat16(self: Any, x: Any) -> Any:
    return x * 1.0625 if "bfloat16" in str(x.dtype) else x


# What both twins compute in their own dtype, where bfloat16 loses digits that float32 keeps.
AFAR: dict[str, Build] = {
    "torch": lambda: {"middle": lambda self, x: (x + 64) - 64},
    "jax": lambda: {"middle": lambda self, x: jax.lax.optimization_barrier(x + 64) - 64},
}


def _in_float32_torch() -> Fields:
    return {"middle": lambda self, x: ((x.float() + 64) - 64).to(x.dtype)}


def _in_float32_jax() -> Fields:
    return {"middle": lambda self, x: ((x.astype(jnp.float32) + 64) - 64).astype(x.dtype)}


class _TwiceTorch(torch.nn.LayerNorm):
    def forward(self, x: Any) -> Any:
        return 2 * super().forward(x)


class _TwiceJax(nnx.LayerNorm):
    def __call__(self, x: Any, **options: Any) -> Any:
        return 2 * super().__call__(x, **options)


def _cancelling(kind: type) -> Build:
    return lambda: {
        "middle": lambda self, x: x / 2,
        "setup": lambda self: setattr(self.norm, "__class__", kind),
    }


def _last_batch_norm_torch() -> Fields:
    """The statistics move twice per step."""

    def middle(self: Any, x: Any) -> Any:
        if self.training:
            self.bn(x.detach())
        return x

    return {"middle": middle}


def _last_batch_norm_jax() -> Fields:
    def middle(self: Any, x: Any) -> Any:
        if not self.bn.use_running_average:
            self.bn(jax.lax.stop_gradient(x))
        return x

    return {"middle": middle}


def symmetric() -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((5, 4))
    return x + x[:, ::-1]


def drawn() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((5, 4))


Models = tuple[Any, Any]


def with_methods(kind: type, fields: Fields) -> Any:
    setup = fields.get("setup", lambda self: None)
    methods = {name: method for name, method in fields.items() if name != "setup"}
    # The running variance of Flax is the biased one: what the steps leave of it is no matter of these tests.
    torch.manual_seed(0)
    model = type(kind.__name__, (kind,), methods)()
    setup(model)
    return model


@cache
def weights() -> TorchModel:
    torch.manual_seed(0)
    return TorchModel()


def models(twin: str = "", build: Build = dict, both: Mapping[str, Build] | None = None) -> Models:
    """Return both twins with the same weights, with methods of `both`; `twin` has those that `build` returns."""
    fields = {name: both[name]() if both else {} for name in TWINS}
    if twin:
        fields[twin] |= build()
    torch_model, jax_model = with_methods(TorchModel, fields["torch"]), with_methods(JaxModel, fields["jax"])
    torch_model.load_state_dict(weights().state_dict())
    return torch_model, load_torch_weights(jax_model, weights())


def check(pair: Models, inputs: np.ndarray, levels: tuple[str, ...], dtypes: tuple[str, ...]) -> Report:
    keep = np.random.default_rng(1).random(5) < 0.6
    return verify(*pair, {"x": inputs, "keep": keep}, levels=levels, dtypes=dtypes, steps=2, names=NameMap())


@dataclass(frozen=True)
class HiddenFault(Fault):
    """A bug in one twin of a small model, as methods that override its own."""

    levels: tuple[str, ...]
    build: Build
    dtypes: tuple[str, ...] = ("float64",)
    inputs: Callable[[], np.ndarray] = field(default=drawn)
    notes: str = ""  # words of the report's notes
    both: Mapping[str, Build] | None = None  # methods of both twins

    def run(self, patch: pytest.MonkeyPatch) -> Report:
        return check(models(self.twin, self.build, self.both), self.inputs(), self.levels, self.dtypes)


def _either(
    name: str, levels: tuple[str, ...], builds: tuple[Build, Build], path: str | None, cause: str, **options: Any
) -> list[HiddenFault]:
    """Return the fault in the PyTorch twin, and in the JAX twin."""
    return [
        HiddenFault(name, twin, path, cause, levels, build, **options)
        for twin, build in zip(TWINS, builds, strict=True)
    ]


NOT_TWICE = "no more when the models are called again (called twice)"
NOT_ELSEWHERE = "no more when the models are called again (other numbers)"

FAULTS = [
    *_either(
        "two faults that cancel",
        ("layers",),
        (_cancelling(_TwiceTorch), _cancelling(_TwiceJax)),
        "norm",
        "times what torch has",
    ),
    *_either(
        "a gradient that its forward pass does not have",
        ("forward", "layers", "gradients"),
        (
            lambda: {"middle": lambda self, x: _TorchWrongGradient.apply(x)},
            lambda: {"middle": lambda self, x: _jax_wrong_gradient(x)},
        ),
        "norm",
        "the outputs agree, the gradients do not",
    ),
    *_either(
        "in training alone", ("forward", "layers", "training"), _both(middle=_when_training), None, "training alone"
    ),
    *_either(
        "in bfloat16 alone",
        ("layers",),
        _both(middle=_in_bfloat16),
        MODEL,
        "in bfloat16 alone",
        dtypes=("float64", "float32", "bfloat16"),
    ),
    *_either(
        "a clip at six of inputs that are smaller",
        ("forward", "layers", "gradients"),
        _both(before=lambda self, x: x.clip(-6, 6)),
        None,
        NOT_ELSEWHERE,
    ),
    *_either(
        "a flip of inputs that are symmetric",
        ("forward",),
        (lambda: {"before": lambda self, x: x.flip(1)}, lambda: {"before": lambda self, x: x[:, ::-1]}),
        None,
        NOT_ELSEWHERE,
        inputs=symmetric,
    ),
    *_either(
        "state that counts its calls", ("forward",), (_counting, _counting_jax), None, NOT_TWICE, notes="keeps state"
    ),
    *_either(
        "gives again what it gave first",
        ("forward",),
        (_remembering, _remembering_jax),
        None,
        "no more when the models are called again",
    ),
    *_either(
        "random numbers in eval",
        ("forward", "layers"),
        (_random, _random_jax),
        MODEL,
        "",
        notes="is not deterministic",
    ),
    *_either(
        "samples of the outputs shifted",
        ("layers",),
        (
            lambda: {"after": lambda self, x, out: {name: leaf.roll(1, 0) for name, leaf in out.items()}},
            lambda: {"after": lambda self, x, out: {name: jnp.roll(leaf, 1, 0) for name, leaf in out.items()}},
        ),
        MODEL,
        "shifted by",
    ),
    *_either("an input that is not used", ("layers",), _both(kept=lambda self, keep: 1), MODEL, "head"),
    *_either(
        "float32 inside bfloat16",
        ("layers",),
        (_in_float32_torch, _in_float32_jax),
        MODEL,
        "in bfloat16 alone: calls fc2",
        dtypes=("float64", "float32", "bfloat16"),
        both=AFAR,
    ),
    *_either(
        "the smallest in place of the largest", ("forward",), _both(best=lambda self, out: (-out).argmax(-1)), None, ""
    ),
    *_either(
        "an output of two forgotten",
        ("forward",),
        _both(after=lambda self, x, out: {"out": out["out"]}),
        None,
        "output.best: missing",
    ),
    *_either(
        "statistics that move twice",
        ("training",),
        (_last_batch_norm_torch, _last_batch_norm_jax),
        "bn",
        "statistics of bn",
    ),
    *_either(
        "one entry off by 1e-9",
        ("layers",),
        (
            lambda: {"middle": lambda self, x: x + 1e-9 * (torch.arange(30).view(5, 6) == 7)},
            lambda: {"middle": lambda self, x: x + 1e-9 * (jnp.arange(30).reshape(5, 6) == 7)},
        ),
        MODEL,
        "differ in 1 of 30 places",
    ),
]
