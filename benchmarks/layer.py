"""Contenders for the layer, forward and forward+backward: both twins, timm, and the floor.

The floor is the layer's three matrix products alone, in the same framework: no implementation can be faster.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from timm.models.volo import OutlookAttention as TimmOutlookAttention
from torch import nn

import outlook_jax
import outlook_torch
from outlook_common.dispatch import Implementation, choose
from outlook_common.op_cases import Case
from outlook_jax.ops import IMPLEMENTATIONS
from outlook_jax.ops.pallas import on_tpu_or_interpreted
from outlook_torch.ops import IMPLEMENTATIONS as TORCH_IMPLEMENTATIONS

# The kernels for a TPU refuse other platforms when a program is lowered.
JAX_IMPLEMENTATIONS = {
    name: each for name, each in IMPLEMENTATIONS.items() if name != "pallas" or on_tpu_or_interpreted()
}

Run = Callable[[], object]
Shape = tuple[int, ...]


class Pair(NamedTuple):
    """The two timed functions of a contender."""

    forward: Run
    training: Run


def contenders(case: Case) -> dict[str, Callable[[], Pair]]:
    """Return the contenders of this case as functions that build them; two are "torch floor" and "jax floor"."""
    x = np.random.default_rng(0).standard_normal((case.B, case.H, case.W, case.dim)).astype(np.float32)
    layer: dict[str, Any] = {"num_heads": case.N, "attn_drop": 0.0, "proj_drop": 0.0, **case.window}
    timm = partial(TimmOutlookAttention, case.dim, **layer)
    makers: dict[str, Callable[[], Pair]] = {
        "torch floor": lambda: _torch_pair(_TorchFloor(case), x),
        "timm": lambda: _torch_pair(timm(), x),
    }
    if case.grid.stride == (1, 1):  # compiled at stride 2 without gradients, timm's layer kills the process
        makers["timm compiled"] = lambda: _torch_pair(cast(Any, torch.compile(timm())), x)
    for name in _that_run(TORCH_IMPLEMENTATIONS, torch.empty, case):
        twin: Callable[..., Any] = partial(outlook_torch.OutlookAttention, case.dim, **layer, implementation=name)
        makers[f"torch {name}"] = lambda twin=twin: _torch_pair(twin(), x)  # type: ignore[misc]
    makers["jax floor"] = lambda: _jax_pair(_JaxFloor(case), x)
    for name in _that_run(JAX_IMPLEMENTATIONS, jnp.empty, case):
        twin = partial(outlook_jax.OutlookAttention, case.dim, **layer, implementation=name)
        makers[f"jax {name}"] = lambda twin=twin: _jax_pair(twin(rngs=nnx.Rngs(0)), x)  # type: ignore[misc]
    return makers


def _that_run(implementations: Mapping[str, Implementation], make: Callable[[Shape], object], case: Case) -> list[str]:
    operands = make(case.value_shape), make(case.logits_shape), None, case.grid
    return [name for name, each in implementations.items() if each.refusal(*operands) is None]


def defaults(case: Case) -> dict[str, str]:
    """Return the implementation that `None` chooses in each framework; in PyTorch, with and without gradients."""

    def chosen(implementations: Mapping[str, Implementation], make: Callable[[Shape], object]) -> str:
        run = choose(None, implementations, make(case.value_shape), make(case.logits_shape), None, case.grid)
        return next(name for name, each in implementations.items() if each.run is run)

    return {
        "torch, forward": chosen(TORCH_IMPLEMENTATIONS, torch.empty),
        "torch, forward+backward": chosen(TORCH_IMPLEMENTATIONS, partial(torch.empty, requires_grad=True)),
        "jax": chosen(JAX_IMPLEMENTATIONS, jnp.empty),
    }


def compile_seconds(case: Case) -> dict[str, float]:
    """Return the seconds for tracing and compiling: first training step minus second."""
    seconds = {}
    for name, make in contenders(case).items():
        if name.startswith("jax"):
            run = make().training
            times = []
            for _ in range(2):
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
            seconds[name] = times[0] - times[1]
    return seconds


class _TorchFloor(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.step = case.grid.stride
        self.v = nn.Linear(case.dim, case.dim, bias=False)
        self.attn = nn.Linear(case.dim, case.N * case.grid.places**2)
        self.proj = nn.Linear(case.dim, case.dim)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.proj(self.v(x)), self.attn(x[:, :: self.step[0], :: self.step[1]])


class _JaxFloor(nnx.Module):
    def __init__(self, case: Case) -> None:
        rngs = nnx.Rngs(0)
        self.step = case.grid.stride
        self.v = nnx.Linear(case.dim, case.dim, use_bias=False, rngs=rngs)
        self.attn = nnx.Linear(case.dim, case.N * case.grid.places**2, rngs=rngs)
        self.proj = nnx.Linear(case.dim, case.dim, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.proj(self.v(x)), self.attn(x[:, :: self.step[0], :: self.step[1]])


def _torch_pair(module: nn.Module, x: np.ndarray) -> Pair:
    inputs = torch.from_numpy(x).requires_grad_()
    targets = (inputs, *module.parameters())

    def training() -> object:
        out = module(inputs)
        outputs = out if isinstance(out, tuple) else (out,)
        return torch.autograd.grad(outputs, targets, [torch.ones_like(o) for o in outputs])

    return Pair(torch.no_grad()(lambda: module(inputs)), training)


def _jax_pair(module: nnx.Module, x: np.ndarray) -> Pair:
    graph, parameters, *rest = nnx.split(module, nnx.Param, ...)
    inputs = jnp.asarray(x)

    @jax.jit
    def forward(parameters: nnx.State[Any, Any], x: jax.Array) -> object:
        return nnx.merge(graph, parameters, *rest)(x)

    @jax.jit
    def training(parameters: nnx.State[Any, Any], x: jax.Array) -> object:
        out, pullback = jax.vjp(lambda p, x: nnx.merge(graph, p, *rest)(x), parameters, x)
        return out, pullback(jax.tree.map(jnp.ones_like, out))

    return Pair(
        lambda: jax.block_until_ready(forward(parameters, inputs)),
        lambda: jax.block_until_ready(training(parameters, inputs)),
    )
