"""Blocks of VOLO: outlooker, transformer, class attention, patch embedding (sections 3.1 and 3.2)."""

from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import PrecisionLike
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from outlook_common.config import DOWNSAMPLE, STEM_STRIDE
from outlook_common.constants import ATTENTION_CHECKPOINT_NAME
from outlook_common.dispatch import ImplementationRequest
from outlook_common.geometry import IntOrPair
from outlook_jax.attention import OutlookAttention
from outlook_jax.layers import LayerOptions, Statistics, batch_norm, conv, dropout, layer_norm, linear, normal
from outlook_jax.ops.promotion import at_least_float32


class DropRate(nnx.Variable[Array]):
    """Rate of stochastic depth: a variable, so that blocks that differ in it alone share one compiled body."""


class DropPath(nnx.Module):
    """Stochastic depth: drops a residual branch for whole samples and scales the others by 1/(1-rate)."""

    def __init__(self, rate: float, **options: Unpack[LayerOptions]) -> None:
        self.rate = DropRate(jnp.asarray(rate, jnp.float32))
        self.deterministic = options.get("deterministic", False)
        self.rngs = options["rngs"].dropout.fork()

    def __call__(self, x: Float[Array, "B *map C"]) -> Float[Array, "B *map C"]:
        """Return `x` with samples zeroed in training, `x` itself otherwise."""
        if self.deterministic:
            return x
        keep = 1 - self.rate[...]
        kept = jax.random.bernoulli(self.rngs(), keep, x.shape[:1]).reshape(-1, *(1,) * (x.ndim - 1))
        return x * (kept.astype(keep.dtype) / jnp.where(keep > 0, keep, 1)).astype(x.dtype)

    def set_view(self, deterministic: bool | None = None) -> None:
        """Set the mode for `nnx.view`, as `nnx.Dropout` does.

        Args:
            deterministic: True returns `x` itself; None leaves it as it is.
        """
        if deterministic is not None:
            self.deterministic = deterministic


class Mlp(nnx.Module):
    """Two linear layers with an exact GELU in between."""

    def __init__(self, dim: int, mlp_ratio: float, **options: Unpack[LayerOptions]) -> None:
        hidden = int(dim * mlp_ratio)
        self.fc1 = linear(dim, hidden, **options)
        self.fc2 = linear(hidden, dim, **options)

    def __call__(self, x: Float[Array, "B *map C"]) -> Float[Array, "B *map C"]:
        """Return fc2(gelu(fc1(x)))."""
        return self.fc2(gelu(self.fc1(x)))


class Outlooker(nnx.Module):
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
        self.norm1 = layer_norm(dim, **options)
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
            kernel_init=normal,
            **options,
        )
        self.norm2 = layer_norm(dim, **options)
        self.mlp = Mlp(dim, mlp_ratio, **options)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Mix each pixel with its neighbourhood, then its own channels."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nnx.Module):
    """Multi-head self-attention over all positions of a map."""

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool = False, attn_drop: float = 0.0, **options: Unpack[LayerOptions]
    ) -> None:
        self.num_heads = num_heads
        self.precision = options.get("precision")
        self.qkv = linear(dim, 3 * dim, bias=qkv_bias, **options)
        self.attn_drop = dropout(attn_drop, **options)
        self.proj = linear(dim, dim, **options)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Attend from every position to every position."""
        B, H, W, C = x.shape
        q, k, v = self._queries_keys_values(x)
        out = attend(q, k, v, self.attn_drop, self.precision)
        # In two steps, each of which an explicitly sharded batch passes: what merges axes and splits others does not.
        return self.proj(out.reshape(B, H * W, C).reshape(B, H, W, C))

    def attention_weights(self, x: Float[Array, "B H W C"]) -> Float[Array, "B N T T"]:
        """Return the weights that each position, a row of T = H*W, gives to each, in float32 at least."""
        q, k, _ = self._queries_keys_values(x)
        return query_key_weights(q, k, self.precision).swapaxes(2, 3)

    def _queries_keys_values(self, x: Float[Array, "B H W C"]) -> list[Float[Array, "B T N D"]]:
        B, H, W, C = x.shape
        return _split(self.qkv(x).reshape(B, H * W, 3 * C), 3, self.num_heads)


class Transformer(nnx.Module):
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
        self.norm1 = layer_norm(dim, **options)
        self.attn = Attention(dim, num_heads, qkv_bias, attn_drop, **options)
        self.drop_path1 = DropPath(drop_path, **options) if drop_path > 0 else unchanged
        self.norm2 = layer_norm(dim, **options)
        self.mlp = Mlp(dim, mlp_ratio, **options)
        self.drop_path2 = DropPath(drop_path, **options) if drop_path > 0 else unchanged

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Mix all positions of the map, then each one's channels."""
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class ClassAttention(nnx.Module):
    """Attention from the class token to all tokens, itself included (CaiT, section 3)."""

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool = False, attn_drop: float = 0.0, **options: Unpack[LayerOptions]
    ) -> None:
        self.num_heads = num_heads
        self.precision = options.get("precision")
        self.kv = linear(dim, 2 * dim, bias=qkv_bias, **options)
        self.q = linear(dim, dim, bias=qkv_bias, **options)
        self.attn_drop = dropout(attn_drop, **options)
        self.proj = linear(dim, dim, **options)

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B 1 C"]:
        """Attend from the class token, the first of T, to all tokens."""
        B, _, C = x.shape
        q, k, v = self._query_keys_values(x)
        out = attend(q, k, v, self.attn_drop, self.precision)
        return self.proj(out.reshape(B, 1, C))

    def attention_weights(self, x: Float[Array, "B T C"]) -> Float[Array, "B N 1 T"]:
        """Return the weights that the class token, the first of T, gives to all tokens, in float32 at least."""
        q, k, _ = self._query_keys_values(x)
        return query_key_weights(q, k, self.precision).swapaxes(2, 3)

    def _query_keys_values(self, x: Float[Array, "B T C"]) -> list[Float[Array, "B _ N D"]]:
        k, v = _split(self.kv(x), 2, self.num_heads)
        (q,) = _split(self.q(x[:, :1]), 1, self.num_heads)
        return [q, k, v]


class ClassBlock(nnx.Module):
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
        self.norm1 = layer_norm(dim, **options)
        self.attn = ClassAttention(dim, num_heads, qkv_bias, attn_drop, **options)
        self.norm2 = layer_norm(dim, **options)
        self.mlp = Mlp(dim, mlp_ratio, **options)

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        """Update the class token, which is the first of T."""
        token = x[:, :1]
        token = token + self.attn(self.norm1(x))
        token = token + self.mlp(self.norm2(token))
        return jnp.concatenate([token, x[:, 1:]], axis=1)


class PatchEmbed(nnx.Module):
    """Patch embedding: three convolutions at half the resolution, then one per patch."""

    def __init__(
        self,
        patch_size: int,
        in_chans: int,
        hidden_dim: int,
        embed_dim: int,
        statistics: Statistics,
        **options: Unpack[LayerOptions],
    ) -> None:
        def convolution(features: int, kernel_size: int, stride: int) -> list[Any]:
            return [
                conv(features, hidden_dim, kernel_size, stride, kernel_size // 2, bias=False, **options),
                batch_norm(hidden_dim, statistics, **options),
                relu,
            ]

        self.conv = nnx.List(
            [*convolution(in_chans, 7, STEM_STRIDE), *convolution(hidden_dim, 3, 1), *convolution(hidden_dim, 3, 1)]
        )
        size = patch_size // STEM_STRIDE
        self.proj = conv(hidden_dim, embed_dim, size, size, **options)

    def __call__(self, images: Float[Array, "B rows columns in_chans"]) -> Float[Array, "B H W C"]:
        """Return one vector per patch, channels last."""
        x = images
        for layer in self.conv:
            x = layer(x)
        return self.proj(x)


class Downsample(nnx.Module):
    """Merges 2x2 positions of a map into one by a convolution."""

    def __init__(self, dim: int, out_dim: int, **options: Unpack[LayerOptions]) -> None:
        self.proj = conv(dim, out_dim, DOWNSAMPLE, DOWNSAMPLE, **options)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w c"]:
        """Return the map at half the resolution."""
        return self.proj(x)


def _split(x: Float[Array, "B T NDs"], parts: int, heads: int) -> list[Float[Array, "B T N D"]]:
    """Split the channels into `parts` equal parts, each by head.

    The gradient is one concatenation; of slices it would be a sum of as many padded arrays, which XLA computes once for
    each product that reads it.
    """
    B, T, channels = x.shape
    size = channels // parts
    return [part.reshape(B, T, heads, size // heads) for part in lax.split(x, (size,) * parts, axis=2)]


def attend(
    q: Float[Array, "B t N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    drop: nnx.Dropout,
    precision: PrecisionLike,
) -> Float[Array, "B t N D"]:
    """Return softmax(q @ k / sqrt(D)) @ v per head, with dropout on the weights in training."""
    # Not jax.nn.dot_product_attention, whose softmax would round float64 to float32.
    weights = drop(query_key_weights(q, k, precision)).astype(v.dtype)
    wide = at_least_float32(q)
    out = jnp.einsum("bnTt,bTnd->btnd", weights, v, precision=precision, preferred_element_type=wide)
    named: Array = checkpoint_name(out.astype(v.dtype), ATTENTION_CHECKPOINT_NAME)  # type: ignore[no-untyped-call]
    return named


def query_key_weights(
    q: Float[Array, "B t N D"], k: Float[Array, "B T N D"], precision: PrecisionLike
) -> Float[Array, "B N T t"]:
    """Return softmax(q @ k / sqrt(D)) per head, in float32 at least."""
    # Keys before queries: a softmax along the last axis takes XLA's CPU compiler more than twice as long.
    wide = at_least_float32(q)
    logits = jnp.einsum("bTnd,btnd->bnTt", k, q, precision=precision, preferred_element_type=wide)
    return jax.nn.softmax(logits * q.shape[-1] ** -0.5, axis=2)


def gelu(x: Float[Array, "B *map C"]) -> Float[Array, "B *map C"]:
    """Return the exact GELU, computed in float32 at least.

    As PyTorch does, by erf: by erfc, as JAX does, and with constants that JAX would round to bfloat16, an MLP takes
    XLA's TPU compiler several times as long.
    """
    wide = x.astype(at_least_float32(x))
    return (0.5 * wide * (1 + lax.erf(wide * 0.5**0.5))).astype(x.dtype)


# Not JAX's own functions: members of models are pickled by name, and theirs name other objects.


def unchanged(x: Array) -> Array:
    """Return `x`."""
    return x


def relu(x: Array) -> Array:
    """Return max(x, 0)."""
    return jax.nn.relu(x)
