"""An encoder as BERT's in both frameworks, written plainly: embeddings, post-norm blocks, tied logits of the words."""

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from torch import nn

WORDS, LENGTH, DIM, HEADS, LAYERS = 16_000, 128, 448, 7, 5


class TorchLayer(nn.Module):
    """Self-attention and a perceptron, each followed by its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(DIM, DIM) for _ in range(4))
        self.norm1 = nn.LayerNorm(DIM)
        self.fc1, self.fc2 = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)
        self.norm2 = nn.LayerNorm(DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block of a sequence (B, T, C)."""
        B, T, C = x.shape
        q, k, v = (part(x).reshape(B, T, HEADS, -1).transpose(1, 2) for part in (self.query, self.key, self.value))
        weights = (q @ k.transpose(-1, -2) * (C // HEADS) ** -0.5).softmax(-1)
        x = self.norm1(x + self.out((weights @ v).transpose(1, 2).reshape(B, T, C)))
        return self.norm2(x + self.fc2(nn.functional.gelu(self.fc1(x))))


class TorchEncoder(nn.Module):
    """Words and positions, blocks, logits by the table of the words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(WORDS, DIM), nn.Embedding(LENGTH, DIM)
        self.norm = nn.LayerNorm(DIM)
        self.layers = nn.ModuleList(TorchLayer() for _ in range(LAYERS))
        self.bias = nn.Parameter(torch.zeros(WORDS))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, T, words) of ids (B, T)."""
        x = self.norm(self.words(ids) + self.positions(torch.arange(ids.shape[1])))
        for layer in self.layers:
            x = layer(x)
        return x @ self.words.weight.T + self.bias


class Layer(nnx.Module):
    """See `TorchLayer`."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.query, self.key, self.value, self.out = (nnx.Linear(DIM, DIM, rngs=rngs) for _ in range(4))
        self.norm1 = nnx.LayerNorm(DIM, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.fc1, self.fc2 = nnx.Linear(DIM, 4 * DIM, rngs=rngs), nnx.Linear(4 * DIM, DIM, rngs=rngs)
        self.norm2 = nnx.LayerNorm(DIM, epsilon=1e-5, use_fast_variance=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the block of a sequence (B, T, C)."""
        B, T, C = x.shape
        q, k, v = (part(x).reshape(B, T, HEADS, -1).swapaxes(1, 2) for part in (self.query, self.key, self.value))
        weights = nnx.softmax(q @ k.swapaxes(-1, -2) * (C // HEADS) ** -0.5)
        x = self.norm1(x + self.out((weights @ v).swapaxes(1, 2).reshape(B, T, C)))
        return self.norm2(x + self.fc2(nnx.gelu(self.fc1(x), approximate=False)))


class Encoder(nnx.Module):
    """See `TorchEncoder`."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.words, self.positions = (nnx.Embed(rows, DIM, rngs=rngs) for rows in (WORDS, LENGTH))
        self.norm = nnx.LayerNorm(DIM, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.layers = nnx.List(Layer(rngs) for _ in range(LAYERS))
        self.bias = nnx.Param(jnp.zeros(WORDS))

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Return the logits (B, T, words) of ids (B, T)."""
        x = self.norm(self.words(ids) + self.positions(jnp.arange(ids.shape[1])))
        for layer in self.layers:
            x = layer(x)
        return x @ self.words.embedding[...].T + self.bias[...]
