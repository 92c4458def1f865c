"""Outlook attention as a layer, with its projections (VOLO, section 3.1)."""

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn

from outlook_common.config import OutlookAttentionConfig
from outlook_common.dispatch import ImplementationRequest, check_implementation
from outlook_common.geometry import IntOrPair, check_layer_input, grid_size, one_batch_axis, unmerged, window_grid
from outlook_torch.layers import Device, Dtype, LayerOptions
from outlook_torch.ops import IMPLEMENTATIONS, outlook_attention
from outlook_torch.ops.reference import widened
from outlook_torch.ops.symbolic import every, is_symbolic
from outlook_torch.tracing import option, scriptable, traceable

fx.wrap("widened")


class OutlookAttention(nn.Module):
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
        device: device of the parameters.
        dtype: dtype of the parameters.

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
        device: Device = None,
        dtype: Dtype = None,
    ) -> None:
        super().__init__()
        self.config = OutlookAttentionConfig(
            dim, num_heads, kernel_size, padding, stride, qkv_bias, attn_drop, proj_drop, qk_scale
        )
        check_implementation(implementation, IMPLEMENTATIONS)
        self.implementation = implementation
        options: LayerOptions = {"device": device, "dtype": dtype}
        self.v = nn.Linear(dim, dim, bias=qkv_bias, **options)
        self.attn = nn.Linear(dim, self.config.attn_features, **options)
        self.attn_drop = nn.Dropout(self.config.attn_drop)
        self.proj = nn.Linear(dim, dim, **options)
        self.proj_drop = nn.Dropout(self.config.proj_drop)

    @traceable
    def forward(
        self,
        x: Float[Tensor, "*B H W C"],
        *,
        dropout_mask: Float[Tensor, "*B h w N KK KK"] | None = None,
        proj_dropout_mask: Float[Tensor, "*B H W C"] | None = None,
    ) -> Float[Tensor, "*B H W C"]:
        """Mix each pixel with its neighbourhood.

        Args:
            x: (*B, H, W, C), any leading axes or none, any H, W >= 1.
            dropout_mask: replaces the random mask, in training or not; see `outlook_attention`.
            proj_dropout_mask: likewise for the output, shape of `x`.

        Returns:
            (*B, H, W, C).

        Raises:
            ValueError: `x` has fewer axes or other channels, or the window grid does not fit its map.
        """
        cfg = self.config
        dropout_mask, proj_dropout_mask = option(dropout_mask), option(proj_dropout_mask)
        shape, traced = x.shape, is_symbolic(x)
        if not traced:  # a graph of torch.fx has one batch axis
            check_layer_input(shape, cfg.dim)
            x, dropout_mask = one_batch_axis(x, 3), one_batch_axis(dropout_mask, 5)
            proj_dropout_mask = one_batch_axis(proj_dropout_mask, 3)
            window_grid((x.shape[1], x.shape[2]), cfg.kernel_size, cfg.stride, cfg.padding)
        B, H, W, C = x.shape
        spare = spare_windows((H, W), cfg.stride)

        value = self.v(x).reshape(B, H, W, cfg.num_heads, cfg.head_dim)
        logits = self._logits(x, spare)
        # Read from the dropout layer itself: its mode and rate may be changed, and so may the layer.
        # A traced graph calls it in either mode.
        training = self.attn_drop.training or traced
        if dropout_mask is None and training and getattr(self.attn_drop, "p", 1) != 0:
            dropout_mask = self.attn_drop(widened(torch.ones_like(logits)))
        if any(spare):
            value, dropout_mask = _with_spare(value, dropout_mask, logits, cfg.stride, spare)

        out = outlook_attention(
            value,
            logits,
            kernel_size=cfg.kernel_size,
            stride=cfg.stride,
            padding=cfg.padding,
            dropout_mask=dropout_mask,
            implementation=self.implementation,
        )
        out = self.proj(out[:, :H, :W].reshape(B, H, W, C))
        out = self.proj_drop(out) if proj_dropout_mask is None else (out * proj_dropout_mask).to(out.dtype)
        return out if traced else unmerged(out, shape)

    def attention_logits(self, x: Float[Tensor, "*B H W C"]) -> Float[Tensor, "*B h w N KK KK"]:
        """Return the predicted logits, scaled: the second operand of `outlook_attention`."""
        cfg = self.config
        check_layer_input(x.shape, cfg.dim)
        *B, H, W, _ = x.shape
        window_grid((H, W), cfg.kernel_size, cfg.stride, cfg.padding)
        logits = self._logits(one_batch_axis(x, 3), (0, 0))
        return unmerged(logits, (*B, *logits.shape[1:]))

    def attention_weights(self, x: Float[Tensor, "*B H W C"]) -> Float[Tensor, "*B h w N KK KK"]:
        """Return the predicted weights, in float32 at least: row p mixes the places of a window into its place p."""
        logits = self.attention_logits(x)
        return widened(logits).softmax(dim=-1)

    def _logits(self, x: Float[Tensor, "B H W C"], spare: tuple[int, int]) -> Float[Tensor, "B h w N KK KK"]:
        cfg = self.config
        B, H, W, _ = x.shape
        h, w = spared_grid((H, W), cfg.stride, spare)
        logits = self.attn(average_pool(x, cfg.stride, spare)) * cfg.qk_scale
        return logits.reshape(B, h, w, cfg.num_heads, cfg.places, cfg.places)

    def __prepare_scriptable__(self) -> nn.Module:
        """Return what `torch.jit.script` compiles instead of this source: a graph with the same parameters."""
        return scriptable(self)

    def extra_repr(self) -> str:
        """Return the configuration, for `print(layer)`."""
        cfg = self.config
        return (
            f"dim={cfg.dim}, num_heads={cfg.num_heads}, kernel_size={cfg.kernel_size}, padding={cfg.padding}, "
            f"stride={cfg.stride}, qk_scale={cfg.qk_scale:g}, implementation={self.implementation!r}"
        )


def average_pool(
    x: Float[Tensor, "B H W C"], stride: tuple[int, int], spare: tuple[int, int] = (0, 0)
) -> Float[Tensor, "B h w C"]:
    """Average pooling over stride*stride pixels; windows at the border average the pixels inside (ceil mode).

    Args:
        x: the map.
        stride: (rows, columns).
        spare: see `spare_windows`; their averages are zero.
    """
    if stride == (1, 1):
        return x
    if any(isinstance(x.shape[axis], torch.SymInt) for axis in (1, 2)):
        return _average_by_index(x, stride, spare)
    pooled = nn.functional.avg_pool2d(x.permute(0, 3, 1, 2), stride, stride, ceil_mode=True)
    return pooled.permute(0, 2, 3, 1)


def spare_windows(map_size: tuple[int, int], stride: tuple[int, int]) -> tuple[int, int]:
    """Return how many windows more than ceil(H/S) an exported program computes along each axis, to no effect.

    torch.export takes any axis for one of two entries or more, unless told otherwise. It knows this of H and W, which
    are given, but not of ceil(H/S): that is 1 for a map of H <= S rows. It is 2 with one window more.
    """
    if not torch.compiler.is_exporting():
        return 0, 0
    rows, columns = (
        int(step > 1 and isinstance(size, torch.SymInt)) for size, step in zip(map_size, stride, strict=True)
    )
    return rows, columns


def spared_grid(map_size: tuple[int, int], stride: tuple[int, int], spare: tuple[int, int]) -> tuple[int, int]:
    """Return the number of windows along each axis, with spare ones."""
    rows, columns = (
        grid_size(size + step * more, step) for size, step, more in zip(map_size, stride, spare, strict=True)
    )
    return rows, columns


def _with_spare(
    value: Float[Tensor, "B H W N D"],
    dropout_mask: Float[Tensor, "B h w N KK KK"] | None,
    logits: Float[Tensor, "B i j N KK KK"],
    stride: tuple[int, int],
    spare: tuple[int, int],
) -> tuple[Float[Tensor, "B I J N D"], Float[Tensor, "B i j N KK KK"]]:
    """Return the values with zeros where only spare windows lie, and a mask that is zero in these windows."""
    beyond = [step * more for step, more in zip(stride, spare, strict=True)]
    value = nn.functional.pad(value, (0, 0, 0, 0, 0, beyond[1], 0, beyond[0]))
    if dropout_mask is not None and dropout_mask.shape == logits.shape:  # drawn here
        kept = dropout_mask
    elif dropout_mask is not None:
        kept = nn.functional.pad(dropout_mask, (0, 0, 0, 0, 0, 0, 0, spare[1], 0, spare[0]))
    else:
        kept = torch.ones_like(logits)
    rows, columns = (
        torch.arange(n, device=logits.device) < n - more for n, more in zip(logits.shape[1:3], spare, strict=True)
    )
    return value, kept * (rows[:, None] & columns)[:, :, None, None, None].to(kept.dtype)


def _average_by_index(
    x: Float[Tensor, "B H W C"], stride: tuple[int, int], spare: tuple[int, int]
) -> Float[Tensor, "B h w C"]:
    # PyTorch's pooling compares the size of its result with that of `x` once more, which ties a symbolic size down.
    (_, H, W, _), (S, T) = x.shape, stride
    h, w = spared_grid((H, W), stride, spare)
    beyond = T - 1 + T * spare[1], S - 1 + S * spare[0]
    padded = nn.functional.pad(x, (0, 0, 0, beyond[0], 0, beyond[1])).to(torch.promote_types(x.dtype, torch.float32))
    lines = [every(padded, 1, i, S, h) for i in range(S)]
    parts = [every(line, 2, j, T, w) for line in lines for j in range(T)]
    rows, columns = (
        (size - step * torch.arange(n, device=x.device)).clamp(1, step) for size, step, n in ((H, S, h), (W, T, w))
    )
    return (sum(parts) / (rows[:, None] * columns)[:, :, None]).to(x.dtype)
