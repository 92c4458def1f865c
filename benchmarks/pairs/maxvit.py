"""A small MaxViT in both frameworks: MBConv, then attention within windows and across a grid (arXiv:2204.01697)."""

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from torch import nn

from outlook_jax.batch_norm import BatchNorm

WINDOW = 7
DIM, INNER, HEADS, CLASSES = 32, 128, 2, 10
STRIDES = (1, 2, 2)  # of the blocks


class TorchMBConv(nn.Module):
    """Pointwise, depthwise, squeeze and excite, pointwise, beside a residual path that is pooled where it strides."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.pre_norm = nn.BatchNorm2d(DIM)
        self.expand = nn.Conv2d(DIM, INNER, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(INNER)
        self.depthwise = nn.Conv2d(INNER, INNER, 3, stride, 1, groups=INNER, bias=False)
        self.norm2 = nn.BatchNorm2d(INNER)
        self.squeeze, self.excite = nn.Linear(INNER, DIM // 4), nn.Linear(DIM // 4, INNER)
        self.project = nn.Conv2d(INNER, DIM, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block of a map (B, C, H, W)."""
        y = nn.functional.gelu(self.norm1(self.expand(self.pre_norm(x))))
        y = nn.functional.gelu(self.norm2(self.depthwise(y)))
        gate = torch.sigmoid(self.excite(nn.functional.silu(self.squeeze(y.mean((2, 3))))))
        if self.stride > 1:
            x = nn.functional.avg_pool2d(x, self.stride)
        return x + self.project(y * gate[:, :, None, None])


class TorchAttention(nn.Module):
    """Self-attention of every window, with a bias for each pair of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(DIM)
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.bias = nn.Parameter(torch.randn(HEADS, WINDOW**2, WINDOW**2) * 0.1)
        self.proj = nn.Linear(DIM, DIM)
        self.norm2 = nn.LayerNorm(DIM)
        self.fc1 = nn.Linear(DIM, 2 * DIM)
        self.fc2 = nn.Linear(2 * DIM, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block of windows (B, N, P, C)."""
        B, N, P, C = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(B, N, P, 3, HEADS, C // HEADS).permute(3, 0, 1, 4, 2, 5)
        weights = (q @ k.transpose(-1, -2) * (C // HEADS) ** -0.5 + self.bias).softmax(-1)
        x = x + self.proj((weights @ v).transpose(2, 3).reshape(B, N, P, C))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class TorchBlock(nn.Module):
    """MBConv, attention within windows, attention across the grid."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.conv = TorchMBConv(stride)
        self.block_attention, self.grid_attention = TorchAttention(), TorchAttention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block of a map (B, C, H, W)."""
        x = self.conv(x).permute(0, 2, 3, 1)
        B, H, W, C = x.shape
        h, w = H // WINDOW, W // WINDOW
        x = x.reshape(B, h, WINDOW, w, WINDOW, C).transpose(2, 3).reshape(B, h * w, WINDOW**2, C)
        x = self.block_attention(x)
        x = x.reshape(B, h, w, WINDOW, WINDOW, C).transpose(2, 3).reshape(B, H, W, C)
        x = x.reshape(B, WINDOW, h, WINDOW, w, C).permute(0, 2, 4, 1, 3, 5).reshape(B, h * w, WINDOW**2, C)
        x = self.grid_attention(x)
        x = x.reshape(B, h, w, WINDOW, WINDOW, C).permute(0, 3, 1, 4, 2, 5).reshape(B, H, W, C)
        return x.permute(0, 3, 1, 2)


class TorchMaxViT(nn.Module):
    """Stem, blocks, head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, DIM, 3, 2, 1)
        self.blocks = nn.Sequential(*map(TorchBlock, STRIDES))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits of images (B, 3, H, W)."""
        return self.head(self.norm(self.blocks(self.stem(images)).mean((2, 3))))


class MBConv(nnx.Module):
    """See `TorchMBConv`."""

    def __init__(self, stride: int, rngs: nnx.Rngs) -> None:
        self.stride = stride
        self.pre_norm = BatchNorm(DIM)
        self.expand = nnx.Conv(DIM, INNER, (1, 1), use_bias=False, rngs=rngs)
        self.norm1 = BatchNorm(INNER)
        self.depthwise = nnx.Conv(
            INNER, INNER, (3, 3), stride, padding=1, feature_group_count=INNER, use_bias=False, rngs=rngs
        )
        self.norm2 = BatchNorm(INNER)
        self.squeeze, self.excite = nnx.Linear(INNER, DIM // 4, rngs=rngs), nnx.Linear(DIM // 4, INNER, rngs=rngs)
        self.project = nnx.Conv(INNER, DIM, (1, 1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the block of a map (B, H, W, C)."""
        y = nnx.gelu(self.norm1(self.expand(self.pre_norm(x))), approximate=False)
        y = nnx.gelu(self.norm2(self.depthwise(y)), approximate=False)
        gate = nnx.sigmoid(self.excite(nnx.silu(self.squeeze(y.mean((1, 2))))))
        if self.stride > 1:
            x = nnx.avg_pool(x, (self.stride,) * 2, (self.stride,) * 2)
        return x + self.project(y * gate[:, None, None])


class Attention(nnx.Module):
    """See `TorchAttention`."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm1 = nnx.LayerNorm(DIM, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.qkv = nnx.Linear(DIM, 3 * DIM, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros((HEADS, WINDOW**2, WINDOW**2)))
        self.proj = nnx.Linear(DIM, DIM, rngs=rngs)
        self.norm2 = nnx.LayerNorm(DIM, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.fc1 = nnx.Linear(DIM, 2 * DIM, rngs=rngs)
        self.fc2 = nnx.Linear(2 * DIM, DIM, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the block of windows (B, N, P, C)."""
        B, N, P, C = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(B, N, P, 3, HEADS, C // HEADS)
        q, k, v = (qkv[..., i, :, :].swapaxes(2, 3) for i in range(3))
        weights = nnx.softmax(q @ k.swapaxes(-1, -2) * (C // HEADS) ** -0.5 + self.bias[...])
        x = x + self.proj((weights @ v).swapaxes(2, 3).reshape(B, N, P, C))
        return x + self.fc2(nnx.gelu(self.fc1(self.norm2(x)), approximate=False))


class Block(nnx.Module):
    """See `TorchBlock`."""

    def __init__(self, stride: int, rngs: nnx.Rngs) -> None:
        self.conv = MBConv(stride, rngs)
        self.block_attention, self.grid_attention = Attention(rngs), Attention(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the block of a map (B, H, W, C)."""
        x = self.conv(x)
        B, H, W, C = x.shape
        h, w = H // WINDOW, W // WINDOW
        x = x.reshape(B, h, WINDOW, w, WINDOW, C).swapaxes(2, 3).reshape(B, h * w, WINDOW**2, C)
        x = self.block_attention(x)
        x = x.reshape(B, h, w, WINDOW, WINDOW, C).swapaxes(2, 3).reshape(B, H, W, C)
        x = x.reshape(B, WINDOW, h, WINDOW, w, C).transpose(0, 2, 4, 1, 3, 5).reshape(B, h * w, WINDOW**2, C)
        x = self.grid_attention(x)
        return x.reshape(B, h, w, WINDOW, WINDOW, C).transpose(0, 3, 1, 4, 2, 5).reshape(B, H, W, C)


class MaxViT(nnx.Module):
    """See `TorchMaxViT`."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(3, DIM, (3, 3), 2, padding=1, rngs=rngs)
        self.blocks = nnx.List(Block(stride, rngs) for stride in STRIDES)
        self.norm = nnx.LayerNorm(DIM, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.head = nnx.Linear(DIM, CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the logits of images (B, H, W, 3)."""
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x.mean((1, 2))))
