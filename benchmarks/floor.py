"""Lower bound on a model's time: its linear layers, convolutions and attention products alone.

No implementation that computes these products in the same framework can be faster.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from jax import lax
from torch import nn

import outlook_torch
from outlook_torch.blocks import Attention, ClassAttention

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Product:
    """A convolution if it has a stride, else a matrix product (batched beyond two axes)."""

    x: Shape
    weight: Shape
    stride: int = 0
    padding: int = 0


def products(model: outlook_torch.VOLO, images: torch.Tensor) -> list[Product]:
    """Return the products of a forward pass; convolutions with channels first."""
    found: list[Product] = []

    def linear(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        x = inputs[0]
        found.append(Product((x.numel() // x.shape[-1], x.shape[-1]), (x.shape[-1], output.shape[-1])))

    def convolution(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        weight = tuple(module.weight.shape)
        found.append(Product(tuple(inputs[0].shape), weight, int(module.stride[0]), int(module.padding[0])))

    def attention(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        N = module.num_heads
        B, C = output.shape[0], output.shape[-1]
        assert isinstance(N, int)
        t, T = output.numel() // (B * C), inputs[0].numel() // (B * C)
        found.append(Product((B * N, t, C // N), (B * N, C // N, T)))
        found.append(Product((B * N, t, T), (B * N, T, C // N)))

    hooks = {nn.Linear: linear, nn.Conv2d: convolution, Attention: attention, ClassAttention: attention}
    handles = [module.register_forward_hook(hooks[type(module)]) for module in model.modules() if type(module) in hooks]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return found


def torch_floor(found: list[Product]) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return two functions: one runs the products, the other both gradients of each too."""
    rng = torch.Generator().manual_seed(0)
    operands = []
    for product in found:
        x, weight = (torch.randn(shape, generator=rng) for shape in (product.x, product.weight))
        if product.stride:
            x = x.contiguous(memory_format=torch.channels_last)
        operands.append((product, x, weight))

    def run(product: Product, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, weight, None, product.stride, product.padding) if product.stride else x @ weight

    def forward() -> None:
        with torch.no_grad():
            for each in operands:
                run(*each)

    def training() -> None:
        for product, x, weight in operands:
            x, weight = x.requires_grad_(), weight.requires_grad_()
            out = run(product, x, weight)
            torch.autograd.grad(out, (x, weight), out.detach())

    return forward, training


def jax_floor(found: list[Product]) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return two functions: one runs the products, the other both gradients of each too."""
    rng = np.random.default_rng(0)

    def draw(product: Product) -> tuple[jax.Array, jax.Array]:
        x, weight = (rng.standard_normal(shape, dtype=np.float32) for shape in (product.x, product.weight))
        if product.stride:
            x, weight = x.transpose(0, 2, 3, 1), weight.transpose(2, 3, 1, 0)
        return jnp.asarray(x), jnp.asarray(weight)

    def run(product: Product, x: jax.Array, weight: jax.Array) -> jax.Array:
        if not product.stride:
            return x @ weight
        return lax.conv_general_dilated(
            x, weight, (product.stride,) * 2, ((product.padding,) * 2,) * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    operands = [draw(product) for product in found]

    @jax.jit
    def forward(operands: list[tuple[jax.Array, jax.Array]]) -> object:
        return [run(product, *each) for product, each in zip(found, operands, strict=True)]

    @jax.jit
    def training(operands: list[tuple[jax.Array, jax.Array]]) -> object:
        out, pullback = jax.vjp(forward, operands)
        return out, pullback(out)

    return lambda: jax.block_until_ready(forward(operands)), lambda: jax.block_until_ready(training(operands))
