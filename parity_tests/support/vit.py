"""A small ViT that is nobody's of this package, in PyTorch, NNX and Linen, for the tests of the verifier."""

from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn

from outlook_parity import NameMap, load_torch_weights

DIM, HEADS, DEPTH, CLASSES, PATCH = 8, 2, 2, 3, 4
TORCH_AXES = (0, 3, 1, 2)


class TorchBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(DIM)
        self.q, self.k, self.v = (nn.Linear(DIM, DIM) for _ in range(3))
        self.proj = nn.Linear(DIM, DIM)
        self.norm2 = nn.LayerNorm(DIM)
        self.fc1, self.act, self.fc2 = nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        q, k, v = (part(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.drop(self.proj(y))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class TorchViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, DIM, PATCH, PATCH)
        self.bn = nn.BatchNorm2d(DIM)
        self.pos = nn.Parameter(torch.randn(1, 4, DIM))
        self.blocks = nn.Sequential(*(TorchBlock() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.embed(images)).flatten(2).transpose(1, 2) + self.pos
        return self.head(self.norm(self.blocks(x)).mean(1))


def attend(q: Any, k: Any, v: Any) -> Any:
    q, k, v = (x.reshape(*x.shape[:2], HEADS, -1) for x in (q, k, v))
    weights = jax.nn.softmax(jnp.einsum("btnd,bTnd->bntT", q, k) * q.shape[-1] ** -0.5, axis=-1)
    return jnp.einsum("bntT,bTnd->btnd", weights, v).reshape(*q.shape[:2], -1)


class NNXBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm1, self.norm2 = (nnx.LayerNorm(DIM, epsilon=1e-5, rngs=rngs) for _ in range(2))
        self.q, self.k, self.v, self.proj = (nnx.Linear(DIM, DIM, rngs=rngs) for _ in range(4))
        self.fc1, self.fc2 = nnx.Linear(DIM, 2 * DIM, rngs=rngs), nnx.Linear(2 * DIM, DIM, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        y = self.norm1(x)
        x = x + self.drop(self.proj(attend(self.q(y), self.k(y), self.v(y))))
        return x + self.fc2(nnx.gelu(self.fc1(self.norm2(x)), approximate=False))


class NNXViT(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Conv(3, DIM, (PATCH, PATCH), (PATCH, PATCH), padding="VALID", rngs=rngs)
        self.bn = nnx.BatchNorm(DIM, momentum=0.9, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.pos = nnx.Param(jnp.zeros((1, 4, DIM)))
        self.blocks = nnx.List([NNXBlock(rngs) for _ in range(DEPTH)])
        self.norm = nnx.LayerNorm(DIM, epsilon=1e-5, rngs=rngs)
        self.head = nnx.Linear(DIM, CLASSES, rngs=rngs)

    def __call__(self, images: Any) -> Any:
        x = self.bn(self.embed(images))
        x = x.reshape(len(x), -1, DIM) + self.pos[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x: Any, train: bool) -> Any:
        y = linen.LayerNorm(epsilon=1e-5, name="norm1")(x)
        q, k, v = (linen.Dense(DIM, name=name)(y) for name in "qkv")
        y = linen.Dense(DIM, name="proj")(attend(q, k, v))
        x = x + linen.Dropout(0.1, deterministic=not train)(y)
        y = linen.Dense(2 * DIM, name="fc1")(linen.LayerNorm(epsilon=1e-5, name="norm2")(x))
        return x + linen.Dense(DIM, name="fc2")(linen.gelu(y, approximate=False))


class LinenViT(linen.Module):
    @linen.compact
    def __call__(self, images: Any, train: bool = False) -> Any:
        x = linen.Conv(DIM, (PATCH, PATCH), (PATCH, PATCH), padding="VALID", name="embed")(images)
        x = linen.BatchNorm(not train, momentum=0.9, epsilon=1e-5, use_fast_variance=False, name="bn")(x)
        pos = self.param("pos", linen.initializers.zeros, (1, 4, DIM))
        x = x.reshape(len(x), -1, DIM) + pos
        for index in range(DEPTH):
            x = LinenBlock(name=f"blocks_{index}")(x, train)
        return linen.Dense(CLASSES, name="head")(linen.LayerNorm(epsilon=1e-5, name="norm")(x).mean(1))


def torch_vit() -> TorchViT:
    torch.manual_seed(0)
    model = TorchViT()
    model.bn.running_var.uniform_(0.5, 2)
    model.bn.running_mean.normal_()
    return model


def nnx_vit() -> Any:
    return load_torch_weights(NNXViT(nnx.Rngs(0)), torch_vit())


def nnx_vit_with_a_bug() -> Any:
    model = nnx_vit()
    model.blocks[1].norm2.epsilon = 1e-6
    return model


def linen_vit() -> Any:
    module = LinenViT()
    return load_torch_weights((module, module.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)))), torch_vit())


def vit_images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((3, 8, 8, 3))


NAMES = NameMap(torch_axes=TORCH_AXES)
