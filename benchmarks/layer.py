"""The layer, forward and forward+backward: every implementation of both twins, timm, and the floor.

The floor is the layer's three matrix products alone, in the same framework: what no implementation can go below.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from timm.models.volo import OutlookAttention as TimmOutlookAttention
from torch import nn

import outlook_jax
import outlook_torch
from outlook_jax.ops import IMPLEMENTATIONS as JAX_IMPLEMENTATIONS
from outlook_torch.ops import IMPLEMENTATIONS as TORCH_IMPLEMENTATIONS
from parity_tests.cases import Case

Run = Callable[[], object]


class Pair(NamedTuple):
    """The two things that are timed of one contender."""

    forward: Run
    training: Run


def contenders(case: Case) -> dict[str, Pair]:
    """Return what runs on this case, by name; the floors are called "torch floor" and "jax floor"."""
    x = np.random.default_rng(0).standard_normal((case.B, case.H, case.W, case.dim)).astype(np.float32)
    layer = {"num_heads": case.N, "attn_drop": 0.0, "proj_drop": 0.0, **case.window}
    pairs = {
        "torch floor": _torch_pair(_TorchFloor(case), x),
        "timm eager": _torch_pair(TimmOutlookAttention(case.dim, **layer), x),
    }
    for name in TORCH_IMPLEMENTATIONS:
        twin = outlook_torch.OutlookAttention(case.dim, **layer, implementation=name)
        pairs[f"torch {name}"] = _torch_pair(twin, x)
    pairs["jax floor"] = _jax_pair(_JaxFloor(case), x)
    for name in JAX_IMPLEMENTATIONS:
        twin = outlook_jax.OutlookAttention(case.dim, **layer, implementation=name, rngs=nnx.Rngs(0))
        pairs[f"jax {name}"] = _jax_pair(twin, x)
    return pairs


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
    graph, parameters, rest = nnx.split(module, nnx.Param, ...)
    inputs = jnp.asarray(x)

    @jax.jit
    def forward(parameters: nnx.State, x: jax.Array) -> object:
        return nnx.merge(graph, parameters, rest)(x)

    @jax.jit
    def training(parameters: nnx.State, x: jax.Array) -> object:
        out, pullback = jax.vjp(lambda p, x: nnx.merge(graph, p, rest)(x), parameters, x)
        return out, pullback(jax.tree.map(jnp.ones_like, out))

    return Pair(
        lambda: jax.block_until_ready(forward(parameters, inputs)),
        lambda: jax.block_until_ready(training(parameters, inputs)),
    )
