"""Outlook attention as a layer, with its projections (VOLO, section 3.1)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype, Initializer, PrecisionLike
from jax import Array, lax
from jaxtyping import Float

from outlook_common.config import OutlookAttentionConfig
from outlook_common.dispatch import ImplementationRequest, check_implementation
from outlook_common.geometry import IntOrPair, check_layer_input, grid_size, window_grid
from outlook_jax.layers import LayerOptions, dropout, linear
from outlook_jax.ops import IMPLEMENTATIONS, outlook_attention
from outlook_jax.ops.promotion import at_least_float32

# The default of `nnx.Linear`.
KERNEL_INIT: Initializer = nnx.initializers.lecun_normal()


class OutlookAttention(nnx.Module):
    """Outlook attention over a channels-last map: (*B, H, W, C) in, (*B, H, W, C) out.

    One linear layer predicts, from each position of the (pooled) map, how the positions of its window mix; there is
    no query-key product. Channel c belongs to head c // (dim // num_heads).

    Args:
        dim: C, the channels.
        num_heads: N, the heads; must divide `dim`.
        kernel_size: K, the window in pixels, an int or (rows, columns).
        padding: P, in pixels, likewise. External-Attention-pytorch passes it to `nn.Unfold` as *dilation*, so it is
            right only for its own defaults; here it is obeyed.
        stride: S, in pixels, likewise; the weights are predicted from averages over S*S pixels (at the border, over
            the pixels inside).
        qkv_bias: whether the value projection has a bias.
        attn_drop: dropout rate of the attention weights.
        proj_drop: dropout rate of the output; None means `attn_drop`, as in External-Attention-pytorch.
        qk_scale: factor on the logits; None means (dim // num_heads) ** -0.5.
        implementation: see `outlook_attention`.
        kernel_init: draws the three weight matrices; the default is that of `nnx.Linear`.
        dtype: dtype of the computation; None infers it from input and parameters, as Flax does.
        param_dtype: dtype of the parameters.
        precision: precision of every matrix product, as in `jax.lax.dot_general`.
        rows_axis: the axis of a mesh whose devices share the rows of the map; see `outlook_attention`.
        deterministic: True switches both dropouts off, as `model.eval()` does.
        rngs: random streams `params` and `dropout`.

    Raises:
        TypeError: a size is not an int or a pair of ints.
        ValueError: a size is not positive, `dim` is not divisible by `num_heads`, a rate lies outside [0, 1], or
            `implementation` is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        kernel_size: IntOrPair = 3,
        padding: IntOrPair = 1,
        stride: IntOrPair = 1,
        qkv_bias: bool = False,
        attn_drop: float = 0.1,
        proj_drop: float | None = None,
        *,
        qk_scale: float | None = None,
        implementation: ImplementationRequest = None,
        kernel_init: Initializer = KERNEL_INIT,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        rows_axis: str | None = None,
        deterministic: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = OutlookAttentionConfig(
            dim, num_heads, kernel_size, padding, stride, qkv_bias, attn_drop, proj_drop, qk_scale
        )
        check_implementation(implementation, IMPLEMENTATIONS)
        # Blocks that run as one loop are told apart by all they hold, which must be hashable: no list.
        self.implementation = tuple(implementation) if isinstance(implementation, list) else implementation
        self.precision = precision
        self.rows_axis = rows_axis
        options: LayerOptions = {
            "dtype": dtype,
            "param_dtype": param_dtype,
            "precision": precision,
            "deterministic": deterministic,
            "rngs": rngs,
        }
        self.v = linear(dim, dim, bias=qkv_bias, kernel_init=kernel_init, **options)
        self.attn = linear(dim, self.config.attn_features, kernel_init=kernel_init, **options)
        self.attn_drop = dropout(self.config.attn_drop, **options)
        self.proj = linear(dim, dim, kernel_init=kernel_init, **options)
        self.proj_drop = dropout(self.config.proj_drop, **options)

    def __call__(
        self,
        x: Float[Array, "*B H W C"],
        *,
        dropout_mask: Float[Array, "*B h w N KK KK"] | None = None,
        proj_dropout_mask: Float[Array, "*B H W C"] | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "*B H W C"]:
        """Mix each pixel with its neighbourhood.

        Args:
            x: (*B, H, W, C), any leading axes or none, any H, W >= 1.
            dropout_mask: replaces the random mask, in training or not; see `outlook_attention`.
            proj_dropout_mask: likewise for the output, shape of `x`.
            deterministic: overrides the layer's setting for this call.
            rngs: a `dropout` stream for this call, instead of the layer's own.

        Returns:
            (*B, H, W, C).

        Raises:
            ValueError: `x` has fewer axes or other channels, or the window grid does not fit its map.
        """
        cfg = self.config
        check_layer_input(x.shape, cfg.dim)
        *B, H, W, C = x.shape
        value = self.v(x).reshape(*B, H, W, cfg.num_heads, cfg.head_dim)
        logits = self.attention_logits(x)
        # Read from the dropout layer itself: its mode and rate may be changed.
        training = not (self.attn_drop.deterministic if deterministic is None else deterministic)
        if dropout_mask is None and training and self.attn_drop.rate > 0:
            ones = jnp.ones(logits.shape, at_least_float32(logits))
            dropout_mask = self.attn_drop(ones, deterministic=deterministic, rngs=rngs)

        out = outlook_attention(
            value,
            logits,
            kernel_size=cfg.kernel_size,
            stride=cfg.stride,
            padding=cfg.padding,
            dropout_mask=dropout_mask,
            implementation=self.implementation,
            precision=self.precision,
            rows_axis=self.rows_axis,
        )
        out = self.proj(out.reshape(*B, H, W, C))
        if proj_dropout_mask is None:
            return self.proj_drop(out, deterministic=deterministic, rngs=rngs)
        return (out * proj_dropout_mask).astype(out.dtype)

    def attention_logits(self, x: Float[Array, "*B H W C"]) -> Float[Array, "*B h w N KK KK"]:
        """Return the predicted logits, scaled: the second operand of `outlook_attention`."""
        cfg = self.config
        check_layer_input(x.shape, cfg.dim)
        *B, H, W, _ = x.shape
        grid = window_grid((H, W), cfg.kernel_size, cfg.stride, cfg.padding)
        logits = _scaled(self.attn(average_pool(x, cfg.stride)), cfg.qk_scale)
        return logits.reshape(*B, *grid.grid, cfg.num_heads, cfg.places, cfg.places)

    def attention_weights(self, x: Float[Array, "*B H W C"]) -> Float[Array, "*B h w N KK KK"]:
        """Return the predicted weights, in float32 at least: row p mixes the places of a window into its place p."""
        logits = self.attention_logits(x)
        return jax.nn.softmax(logits.astype(at_least_float32(logits)), axis=-1)


def _scaled(logits: Array, scale: float) -> Array:
    # JAX would round the factor itself to bfloat16 before multiplying; PyTorch rounds only the product.
    wide = at_least_float32(logits)
    return (logits.astype(wide) * scale).astype(logits.dtype)


def average_pool(x: Float[Array, "*B H W C"], stride: tuple[int, int]) -> Float[Array, "*B h w C"]:
    """Average pooling over stride*stride pixels; windows at the border average the pixels inside (ceil mode)."""
    if stride == (1, 1):
        return x
    *B, H, W, _ = x.shape
    wide, ones = at_least_float32(x), (1,) * len(B)
    # Per axis: how far the last window reaches past the border, and how many pixels inside each window has.
    beyond = [grid_size(size, step) * step - size for size, step in zip((H, W), stride, strict=True)]
    inside = [
        np.minimum(step, size - step * np.arange(grid_size(size, step)))
        for size, step in zip((H, W), stride, strict=True)
    ]
    sums = lax.reduce_window(
        x.astype(wide),
        np.zeros((), wide),
        lax.add,
        window_dimensions=(*ones, *stride, 1),
        window_strides=(*ones, *stride, 1),
        padding=(*((0, 0),) * len(B), (0, beyond[0]), (0, beyond[1]), (0, 0)),
    )
    count = np.outer(*inside)[..., None].astype(wide)
    return (sums / np.expand_dims(count, tuple(range(len(B))))).astype(x.dtype)
