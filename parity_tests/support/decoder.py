"""A small decoder in both frameworks, written by hand: embeddings, RMSNorm in float32, RoPE, grouped keys.

Every choice is an entry of `HONEST`, so that a fault is another entry in one twin.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from outlook_parity import load_torch_weights

VOCABULARY, LENGTH, WIDTH, HEADS, GROUPS, HIDDEN = 31, 6, 16, 4, 2, 24
HEAD = WIDTH // HEADS

Choices = dict[str, Any]

HONEST: Choices = {
    "eps": 1e-6,
    "offset": 0.0,
    "base": 10_000.0,
    "layout": "halves",
    "first": 0,
    "head": HEAD,
    "scale": HEAD**-0.5,
    "window": 4 * LENGTH,
    "repeat": "repeat",
    "axis": -1,
    "activation": "silu",
    "factor": 1.0,
    "types": 0,
}


def ids() -> np.ndarray:
    """Return token ids."""
    return np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH))


def _tables(choices: Choices, length: int) -> tuple[np.ndarray, np.ndarray]:
    frequencies = choices["base"] ** (-np.arange(0, choices["head"], 2) / choices["head"])
    angles = (np.arange(length) + choices["first"])[:, None] * frequencies
    angles = np.concatenate([angles, angles], -1) if choices["layout"] == "halves" else np.repeat(angles, 2, -1)
    return np.cos(angles), np.sin(angles)


def _seen(choices: Choices, length: int) -> np.ndarray:
    distance = np.arange(length)[:, None] - np.arange(length)[None, :]
    return (distance >= 0) & (distance < choices["window"])


class TorchRMSNorm(torch.nn.Module):
    """RMSNorm in float32."""

    def __init__(self, choices: Choices) -> None:
        super().__init__()
        self.weight, self.choices = torch.nn.Parameter(torch.ones(WIDTH)), choices

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.to(torch.float32)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.choices["eps"])
        weight = self.weight + self.choices["offset"] if self.choices["offset"] else self.weight
        return weight * y.to(x.dtype)


class TorchAttention(torch.nn.Module):
    """Attention with rotary embeddings and grouped keys."""

    def __init__(self, choices: Choices) -> None:
        super().__init__()
        self.choices = choices
        self.q, self.o = (torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.k, self.v = (torch.nn.Linear(WIDTH, GROUPS * HEAD, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length, choices = x.shape[1], self.choices
        q, k, v = (
            one.unflatten(-1, (-1, choices["head"])).transpose(1, 2) for one in (self.q(x), self.k(x), self.v(x))
        )
        cos, sin = (torch.tensor(table, dtype=x.dtype) for table in _tables(choices, length))
        q, k = (one * cos + self._rotated(one) * sin for one in (q, k))
        repeats = HEADS // GROUPS
        if choices["repeat"] == "repeat":
            k, v = (one.repeat_interleave(repeats, 1) for one in (k, v))
        else:
            k, v = (one.repeat(1, repeats, 1, 1) for one in (k, v))
        logits = q @ k.transpose(-1, -2) * choices["scale"]
        logits = logits.masked_fill(~torch.tensor(_seen(choices, length)), torch.finfo(x.dtype).min)
        weights = torch.softmax(logits, choices["axis"], dtype=torch.float32).to(x.dtype)
        return self.o((weights @ v).transpose(1, 2).flatten(2))

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        if self.choices["layout"] == "halves":
            half = x.shape[-1] // 2
            return torch.cat([-x[..., half:], x[..., :half]], -1)
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


class TorchFeedForward(torch.nn.Module):
    """A gated feed-forward layer."""

    def __init__(self, choices: Choices) -> None:
        super().__init__()
        self.gate, self.up = (torch.nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down, self.choices = torch.nn.Linear(HIDDEN, WIDTH, bias=False), choices

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        functions = {
            "silu": torch.nn.functional.silu,
            "gelu": torch.nn.functional.gelu,
            "tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
            "quick": lambda x: x * torch.sigmoid(1.702 * x),
            "relu": torch.relu,
            "own": lambda x: x / (1 + torch.exp(-3 * x)),
        }
        return self.down(functions[self.choices["activation"]](self.gate(x)) * self.up(x))


class TorchBlock(torch.nn.Module):
    """A block."""

    def __init__(self, choices: Choices) -> None:
        super().__init__()
        self.norm1, self.attn = TorchRMSNorm(choices), TorchAttention(choices)
        self.norm2, self.mlp = TorchRMSNorm(choices), TorchFeedForward(choices)
        self.factor = choices["factor"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.attn(self.norm1(x))
        x = x + (y if self.factor == 1 else y * self.factor)
        return x + self.mlp(self.norm2(x))


class TorchDecoder(torch.nn.Module):
    """The PyTorch twin."""

    def __init__(self, choices: Choices) -> None:
        super().__init__()
        self.choices = choices
        self.embed, self.positions = torch.nn.Embedding(VOCABULARY, WIDTH), torch.nn.Embedding(2 * LENGTH, WIDTH)
        self.blocks = torch.nn.ModuleList(TorchBlock(choices) for _ in range(1))
        self.norm = TorchRMSNorm(choices)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(ids.shape[1]) + self.choices["types"]
        x = self.embed(ids) + self.positions(positions)[None]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class JaxRMSNorm(nnx.Module):
    """RMSNorm in float32."""

    def __init__(self, choices: Choices) -> None:
        self.weight, self.choices = nnx.Param(jnp.ones(WIDTH)), choices

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y**2, -1, keepdims=True) + self.choices["eps"])
        weight = self.weight[...] + self.choices["offset"] if self.choices["offset"] else self.weight[...]
        return weight * y.astype(x.dtype)


class JaxAttention(nnx.Module):
    """Attention with rotary embeddings and grouped keys."""

    def __init__(self, choices: Choices, rngs: nnx.Rngs) -> None:
        self.choices = choices
        self.q, self.o = (nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs) for _ in range(2))
        self.k, self.v = (nnx.Linear(WIDTH, GROUPS * HEAD, use_bias=False, rngs=rngs) for _ in range(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        length, choices = x.shape[1], self.choices
        q, k, v = (one.reshape(*one.shape[:2], -1, choices["head"]) for one in (self.q(x), self.k(x), self.v(x)))
        cos, sin = (jnp.asarray(table, x.dtype)[:, None] for table in _tables(choices, length))
        q, k = (one * cos + self._rotated(one) * sin for one in (q, k))
        repeats = HEADS // GROUPS
        if choices["repeat"] == "repeat":
            k, v = (jnp.repeat(one, repeats, 2) for one in (k, v))
        else:
            k, v = (jnp.tile(one, (1, 1, repeats, 1)) for one in (k, v))
        logits = jnp.einsum("bqhd,bkhd->bhqk", q * choices["scale"], k)
        logits = jnp.where(_seen(choices, length), logits, jnp.finfo(x.dtype).min)
        weights = jax.nn.softmax(logits.astype(jnp.float32), choices["axis"]).astype(x.dtype)
        return self.o(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*x.shape[:2], -1))

    def _rotated(self, x: jax.Array) -> jax.Array:
        if self.choices["layout"] == "halves":
            half = x.shape[-1] // 2
            return jnp.concatenate([-x[..., half:], x[..., :half]], -1)
        return jnp.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)


class JaxFeedForward(nnx.Module):
    """A gated feed-forward layer."""

    def __init__(self, choices: Choices, rngs: nnx.Rngs) -> None:
        self.gate, self.up = (nnx.Linear(WIDTH, HIDDEN, use_bias=False, rngs=rngs) for _ in range(2))
        self.down, self.choices = nnx.Linear(HIDDEN, WIDTH, use_bias=False, rngs=rngs), choices

    def __call__(self, x: jax.Array) -> jax.Array:
        functions = {
            "silu": jax.nn.silu,
            "gelu": lambda x: jax.nn.gelu(x, approximate=False),
            "tanh": jax.nn.gelu,
            "quick": lambda x: x * jax.nn.sigmoid(1.702 * x),
            "relu": jax.nn.relu,
            "own": lambda x: x / (1 + jnp.exp(-3 * x)),
        }
        return self.down(functions[self.choices["activation"]](self.gate(x)) * self.up(x))


class JaxBlock(nnx.Module):
    """A block."""

    def __init__(self, choices: Choices, rngs: nnx.Rngs) -> None:
        self.norm1, self.attn = JaxRMSNorm(choices), JaxAttention(choices, rngs)
        self.norm2, self.mlp = JaxRMSNorm(choices), JaxFeedForward(choices, rngs)
        self.factor = choices["factor"]

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.attn(self.norm1(x))
        x = x + (y if self.factor == 1 else y * self.factor)
        return x + self.mlp(self.norm2(x))


class JaxDecoder(nnx.Module):
    """The JAX twin."""

    def __init__(self, choices: Choices) -> None:
        rngs = nnx.Rngs(0)
        self.choices = choices
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.positions = nnx.Embed(2 * LENGTH, WIDTH, rngs=rngs)
        self.blocks = nnx.List([JaxBlock(choices, rngs) for _ in range(1)])
        self.norm = JaxRMSNorm(choices)

    def __call__(self, ids: jax.Array) -> jax.Array:
        positions = jnp.arange(ids.shape[1]) + self.choices["types"]
        x = self.embed(ids) + self.positions(positions)[None]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def twins(twin: Literal["torch", "jax"] = "jax", **other: Any) -> tuple[torch.nn.Module, nnx.Module]:
    """Return both twins with the same weights; the choices `other` are those of one twin alone."""
    torch.manual_seed(0)
    choices = {"torch": HONEST, "jax": HONEST} | {twin: HONEST | other}
    theirs = TorchDecoder(choices["torch"]).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
            else:
                parameter.normal_(std=3 * parameter.shape[-1] ** -0.5)
    return theirs, load_torch_weights(JaxDecoder(choices["jax"]), theirs)
