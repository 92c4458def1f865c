"""Layers of the released models: their numerics and initial weights."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Required, TypedDict, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer, PrecisionLike
from jax import Array, lax

from outlook_common.constants import INIT_STD, NORM_EPSILON
from outlook_jax.batch_norm import AxisNames, BatchNorm
from outlook_jax.draws import draw
from outlook_jax.ops.promotion import along_last_axis, at_least_float32

_NORMAL: Initializer = nnx.initializers.normal(INIT_STD)


def normal(key: Array, shape: Sequence[int], dtype: Any = jnp.float32, *_: Any) -> Array:
    """Draw initial weights; timm's truncated normal is cut at ±2, a hundred standard deviations away."""
    return draw(_NORMAL, key, shape, dtype)


class LayerOptions(TypedDict, total=False):
    """Keywords that every block passes on to its layers."""

    dtype: Dtype | None
    param_dtype: Dtype
    precision: PrecisionLike
    deterministic: bool
    rngs: Required[nnx.Rngs]


class Statistics(TypedDict):
    """Keywords of every BatchNorm: of which part of the batch its statistics are."""

    axis_name: AxisNames
    ghost_batches: int


class Dropout(nnx.Dropout):
    """Flax's dropout, bit for bit, that compiles in a fraction of the time where its input has many axes.

    XLA's CPU compiler takes seconds for a draw in six axes, and a tenth of that for the same numbers on one.
    """

    def __call__(
        self,
        x: Array,
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | Array | None = None,
    ) -> Array:
        """Return `x` with elements zeroed and the others scaled by 1/(1-rate) in training, `x` itself otherwise."""
        if (self.deterministic if deterministic is None else deterministic) or self.rate == 0:
            return x
        if self.rate == 1 or self.broadcast_dims:
            return super().__call__(x, deterministic=False, rngs=rngs)
        flat = super().__call__(jnp.ones(x.size, jnp.float32), deterministic=False, rngs=rngs)
        kept = lax.reshape(flat > 0, x.shape, out_sharding=jax.typeof(x).sharding)
        return lax.select(kept, x / (1.0 - self.rate), jnp.zeros_like(x))


class LayerNorm(nnx.LayerNorm):
    """Flax's LayerNorm with a two-pass variance, bit for bit, that promotes no dtype implicitly."""

    def __call__(self, x: Array) -> Array:  # type: ignore[override] # Flax's takes a mask too, which no model here has
        """Normalise the last axis; statistics are computed in float32 at least."""
        assert self.scale is not None
        assert self.bias is not None
        x, scale, bias = self.promote_dtype((x, self.scale[...], self.bias[...]), dtype=self.dtype)
        wide, dtype = at_least_float32(x), x.dtype
        x = x.astype(wide)
        scale, bias = (along_last_axis(p.astype(wide), x.ndim) for p in (scale, bias))
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = jnp.square(centred).mean(axis=-1, keepdims=True)
        return (centred * (lax.rsqrt(variance + self.epsilon) * scale) + bias).astype(dtype)


def linear(
    in_features: int,
    out_features: int,
    bias: bool = True,
    *,
    kernel_init: Initializer = normal,
    **options: Unpack[LayerOptions],
) -> nnx.Linear:
    """Make a linear layer."""
    return nnx.Linear(in_features, out_features, use_bias=bias, kernel_init=kernel_init, **_of_product(options))


def conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int,
    padding: int = 0,
    bias: bool = True,
    **options: Unpack[LayerOptions],
) -> nnx.Conv:
    """Make a convolution with a square kernel and PyTorch's initial weights: uniform within 1/sqrt(fan_in)."""
    bound = (in_channels * kernel_size**2) ** -0.5

    def uniform(key: Array, shape: Sequence[int], dtype: Any = jnp.float32, *_: Any) -> Array:
        return draw(partial(jax.random.uniform, minval=-bound, maxval=bound), key, shape, dtype)

    return nnx.Conv(
        in_channels,
        out_channels,
        (kernel_size, kernel_size),
        stride,
        # Explicit: "SAME" would pad a strided convolution on one side only.
        padding=((padding, padding), (padding, padding)),
        use_bias=bias,
        kernel_init=uniform,
        bias_init=uniform,
        **_of_product(options),
    )


def layer_norm(dim: int, **options: Unpack[LayerOptions]) -> LayerNorm:
    """Make a LayerNorm with a two-pass variance, as PyTorch's is."""
    rngs = options["rngs"]
    return LayerNorm(dim, epsilon=NORM_EPSILON, use_fast_variance=False, rngs=rngs, **_dtypes(options))


def batch_norm(features: int, statistics: Statistics, **options: Unpack[LayerOptions]) -> BatchNorm:
    """Make a BatchNorm over all axes but the last."""
    training = not options.get("deterministic", False)
    return BatchNorm(features, use_running_average=not training, **statistics, **_dtypes(options))


def dropout(rate: float, **options: Unpack[LayerOptions]) -> Dropout:
    """Make a dropout with a random stream of its own."""
    return Dropout(rate, deterministic=options.get("deterministic", False), rngs=options["rngs"])


def parameter(shape: Sequence[int], **options: Unpack[LayerOptions]) -> nnx.Param[Array]:
    """Make a parameter outside any layer."""
    return nnx.Param(normal(options["rngs"].params(), shape, options.get("param_dtype", jnp.float32)))


def _of_product(options: LayerOptions) -> dict[str, Any]:
    """Return the options of a layer that multiplies by a kernel."""
    return {name: value for name, value in options.items() if name != "deterministic"}


def _dtypes(options: LayerOptions) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in ("dtype", "param_dtype")}
