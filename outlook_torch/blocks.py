"""Blocks of VOLO: outlooker, transformer, class attention, patch embedding (sections 3.1 and 3.2)."""

from typing import Unpack

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, fx, nn

from outlook_common.config import DOWNSAMPLE, STEM_STRIDE
from outlook_common.constants import BATCH_NORM_MOMENTUM, NORM_EPSILON
from outlook_common.dispatch import ImplementationRequest
from outlook_common.geometry import IntOrPair
from outlook_torch.attention import OutlookAttention
from outlook_torch.layers import LayerOptions
from outlook_torch.ops.reference import widened
from outlook_torch.ops.symbolic import is_symbolic

fx.wrap("widened")  # in each module that calls it


class DropPath(nn.Module):
    """Stochastic depth: drops a residual branch for whole samples and scales the others by 1/(1-rate)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:  # types and operations that torch.jit.script compiles
        """Return `x` (B, *map, C) with samples zeroed in training, `x` itself otherwise."""
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        kept = torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), device=x.device) < keep
        return x * (kept / keep if keep > 0 else kept).to(x.dtype)

    def extra_repr(self) -> str:
        """Return the rate, for `print(model)`."""
        return f"rate={self.rate:.3f}"


class Mlp(nn.Module):
    """Two linear layers with an exact GELU in between."""

    def __init__(self, dim: int, mlp_ratio: float, **options: Unpack[LayerOptions]) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.fc1 = nn.Linear(dim, hidden, **options)
        self.fc2 = nn.Linear(hidden, dim, **options)

    def forward(self, x: Float[Tensor, "B *map C"]) -> Float[Tensor, "B *map C"]:
        """Return fc2(gelu(fc1(x)))."""
        return self.fc2(F.gelu(self.fc1(x)))


class Outlooker(nn.Module):
    """Outlook attention and an MLP, each behind a LayerNorm and on a residual branch.

    There is no stochastic depth: the original passes the rate to transformer blocks only.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: IntOrPair = 3,
        padding: IntOrPair = 1,
        stride: IntOrPair = 2,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        *,
        implementation: ImplementationRequest = None,
        **options: Unpack[LayerOptions],
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPSILON, **options)
        self.attn = OutlookAttention(
            dim,
            num_heads,
            kernel_size,
            padding,
            stride,
            qkv_bias,
            attn_drop,
            proj_drop=0.0,
            implementation=implementation,
            **options,
        )
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPSILON, **options)
        self.mlp = Mlp(dim, mlp_ratio, **options)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        """Mix each pixel with its neighbourhood, then its own channels."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Multi-head self-attention over all positions of a map."""

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool = False, attn_drop: float = 0.0, **options: Unpack[LayerOptions]
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **options)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **options)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        """Attend from every position to every position."""
        B, H, W, C = x.shape
        q, k, v = self._queries_keys_values(x)
        out = attend(q, k, v, self.attn_drop)
        return self.proj(out.reshape(B, H, W, C))

    def attention_weights(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B N T T"]:
        """Return the weights that each position, a row of T = H*W, gives to each, in float32 at least."""
        q, k, _ = self._queries_keys_values(x)
        return query_key_weights(q, k)

    def _queries_keys_values(self, x: Float[Tensor, "B H W C"]) -> tuple[Float[Tensor, "B T N D"], ...]:
        B, H, W, C = x.shape
        return self.qkv(x).reshape(B, H * W, 3, self.num_heads, C // self.num_heads).unbind(2)


class Transformer(nn.Module):
    """Self-attention and an MLP, each behind a LayerNorm and on a residual branch."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        **options: Unpack[LayerOptions],
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPSILON, **options)
        self.attn = Attention(dim, num_heads, qkv_bias, attn_drop, **options)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPSILON, **options)
        self.mlp = Mlp(dim, mlp_ratio, **options)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        """Mix all positions of the map, then each one's channels."""
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class ClassAttention(nn.Module):
    """Attention from the class token to all tokens, itself included (CaiT, section 3)."""

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool = False, attn_drop: float = 0.0, **options: Unpack[LayerOptions]
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **options)
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **options)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **options)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B 1 C"]:
        """Attend from the class token, the first of T, to all tokens."""
        B, _, C = x.shape
        q, k, v = self._query_keys_values(x)
        out = attend(q, k, v, self.attn_drop)
        return self.proj(out.reshape(B, 1, C))

    def attention_weights(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B N 1 T"]:
        """Return the weights that the class token, the first of T, gives to all tokens, in float32 at least."""
        q, k, _ = self._query_keys_values(x)
        return query_key_weights(q, k)

    def _query_keys_values(self, x: Float[Tensor, "B T C"]) -> tuple[Float[Tensor, "B _ N D"], ...]:
        B, T, C = x.shape
        k, v = self.kv(x).reshape(B, T, 2, self.num_heads, C // self.num_heads).unbind(2)
        q = self.q(x[:, :1]).reshape(B, 1, self.num_heads, C // self.num_heads)
        return q, k, v


class ClassBlock(nn.Module):
    """Class attention and an MLP for the class token; the other tokens pass through."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        **options: Unpack[LayerOptions],
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPSILON, **options)
        self.attn = ClassAttention(dim, num_heads, qkv_bias, attn_drop, **options)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPSILON, **options)
        self.mlp = Mlp(dim, mlp_ratio, **options)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        """Update the class token, which is the first of T."""
        token = x[:, :1]
        token = token + self.attn(self.norm1(x))
        token = token + self.mlp(self.norm2(token))
        return torch.cat([token, x[:, 1:]], dim=1)


class PatchEmbed(nn.Module):
    """Patch embedding: three convolutions at half the resolution, then one per patch."""

    def __init__(
        self, patch_size: int, in_chans: int, hidden_dim: int, embed_dim: int, **options: Unpack[LayerOptions]
    ) -> None:
        super().__init__()

        def convolution(features: int, kernel_size: int, stride: int) -> list[nn.Module]:
            return [
                nn.Conv2d(features, hidden_dim, kernel_size, stride, kernel_size // 2, bias=False, **options),
                nn.BatchNorm2d(hidden_dim, eps=NORM_EPSILON, momentum=BATCH_NORM_MOMENTUM, **options),
                nn.ReLU(),
            ]

        self.conv = nn.Sequential(
            *convolution(in_chans, 7, STEM_STRIDE), *convolution(hidden_dim, 3, 1), *convolution(hidden_dim, 3, 1)
        )
        size = patch_size // STEM_STRIDE
        self.proj = nn.Conv2d(hidden_dim, embed_dim, size, size, **options)

    def forward(self, images: Float[Tensor, "B in_chans rows columns"]) -> Float[Tensor, "B H W C"]:
        """Return one vector per patch, channels last."""
        # Channels last in memory from here on, so that no later layer has to copy its input or to add unlike layouts.
        # Not by contiguous(memory_format=…), which torch.func.vmap does not know.
        images = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        return self.proj(self.conv(images)).permute(0, 2, 3, 1)


class Downsample(nn.Module):
    """Merges 2x2 positions of a map into one by a convolution."""

    def __init__(self, dim: int, out_dim: int, **options: Unpack[LayerOptions]) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, out_dim, DOWNSAMPLE, DOWNSAMPLE, **options)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B h w c"]:
        """Return the map at half the resolution."""
        return self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def attend(
    q: Float[Tensor, "B t N D"], k: Float[Tensor, "B T N D"], v: Float[Tensor, "B T N D"], drop: nn.Dropout
) -> Float[Tensor, "B t N D"]:
    """Return softmax(q @ k / sqrt(D)) @ v per head, with dropout on the weights in training."""
    if is_symbolic(q) and drop.p > 0:  # a traced graph calls the dropout in either mode
        weights = drop(query_key_weights(q, k)).to(v.dtype)
        return torch.einsum("bntT,bTnd->btnd", weights, v)
    rate = drop.p if drop.training else 0.0
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=rate).transpose(1, 2)


def query_key_weights(q: Float[Tensor, "B t N D"], k: Float[Tensor, "B T N D"]) -> Float[Tensor, "B N t T"]:
    """Return softmax(q @ k / sqrt(D)) per head, in float32 at least: `attend` never holds it."""
    logits = torch.einsum("btnd,bTnd->bntT", widened(q), widened(k))
    return (logits * q.shape[3] ** -0.5).softmax(dim=-1)
