"""Layers of the released models: their numerics and initial weights."""

from collections.abc import Sequence
from typing import Any, Required, TypedDict, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer, PrecisionLike
from jax import Array

from outlook_common.constants import INIT_STD, NORM_EPSILON
from outlook_jax.batch_norm import AxisNames, BatchNorm

# timm's truncated normal is cut at ±2, a hundred standard deviations away.
INIT: Initializer = nnx.initializers.normal(INIT_STD)


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


def linear(
    in_features: int,
    out_features: int,
    bias: bool = True,
    *,
    kernel_init: Initializer = INIT,
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

    def uniform(key: Array, shape: Any, dtype: Any = jnp.float32, *_: Any) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

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


def layer_norm(dim: int, **options: Unpack[LayerOptions]) -> nnx.LayerNorm:
    """Make a LayerNorm with a two-pass variance, as PyTorch's is."""
    rngs = options["rngs"]
    return nnx.LayerNorm(dim, epsilon=NORM_EPSILON, use_fast_variance=False, rngs=rngs, **_dtypes(options))


def batch_norm(features: int, statistics: Statistics, **options: Unpack[LayerOptions]) -> BatchNorm:
    """Make a BatchNorm over all axes but the last."""
    training = not options.get("deterministic", False)
    return BatchNorm(features, use_running_average=not training, **statistics, **_dtypes(options))


def dropout(rate: float, **options: Unpack[LayerOptions]) -> nnx.Dropout:
    """Make a dropout with a random stream of its own."""
    return nnx.Dropout(rate, deterministic=options.get("deterministic", False), rngs=options["rngs"])


def parameter(shape: Sequence[int], **options: Unpack[LayerOptions]) -> nnx.Param[Array]:
    """Make a parameter outside any layer."""
    return nnx.Param(INIT(options["rngs"].params(), tuple(shape), options.get("param_dtype", jnp.float32)))


def _of_product(options: LayerOptions) -> dict[str, Any]:
    """Return the options of a layer that multiplies by a kernel."""
    return {name: value for name, value in options.items() if name != "deterministic"}


def _dtypes(options: LayerOptions) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in ("dtype", "param_dtype")}
