"""The layers that VOLO is built from, with the numerics of the released models."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, PrecisionLike
from jax import Array

from outlook_common.constants import INIT_STD, NORM_EPSILON
from outlook_jax.batch_norm import BatchNorm

# Of linear weights, pos_embed and cls_token. timm's truncated normal is cut at ±2, a hundred standard deviations away.
INIT = nnx.initializers.normal(INIT_STD)


@dataclass(frozen=True)
class Factory:
    """Makes all layers of a model with the same dtypes, precision and random streams."""

    rngs: nnx.Rngs
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    deterministic: bool = False

    def param(self, shape: Sequence[int]) -> nnx.Param[Array]:
        """Make a parameter outside any layer."""
        return nnx.Param(INIT(self.rngs.params(), tuple(shape), self.param_dtype))

    def linear(self, features_in: int, features_out: int, *, bias: bool = True) -> nnx.Linear:
        """Make a linear layer."""
        return nnx.Linear(features_in, features_out, use_bias=bias, kernel_init=INIT, **self.products)

    def conv(
        self, features_in: int, features_out: int, kernel_size: int, stride: int, padding: int = 0, *, bias: bool = True
    ) -> nnx.Conv:
        """Make a convolution with square kernel and PyTorch's initial weights."""
        # Everything uniform within 1/sqrt(fan_in).
        bound = (features_in * kernel_size**2) ** -0.5

        def uniform(key: Array, shape: Any, dtype: Any = jnp.float32, *_: Any) -> Array:
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        return nnx.Conv(
            features_in,
            features_out,
            (kernel_size, kernel_size),
            stride,
            # Explicit: "SAME" would pad a strided convolution on one side only.
            padding=((padding, padding), (padding, padding)),
            use_bias=bias,
            kernel_init=uniform,
            bias_init=uniform,
            **self.products,
        )

    def layer_norm(self, dim: int) -> nnx.LayerNorm:
        """Make a LayerNorm with a two-pass variance, as PyTorch's is."""
        return nnx.LayerNorm(
            dim,
            epsilon=NORM_EPSILON,
            use_fast_variance=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
        )

    def batch_norm(self, features: int) -> BatchNorm:
        """Make a BatchNorm over all but the last axis."""
        return BatchNorm(
            features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            use_running_average=self.deterministic,
        )

    def dropout(self, rate: float) -> nnx.Dropout:
        """Make a dropout with a random stream of its own."""
        return nnx.Dropout(rate, deterministic=self.deterministic, rngs=self.rngs)

    @property
    def products(self) -> dict[str, Any]:
        """The arguments of a layer that multiplies by a kernel."""
        return {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "precision": self.precision,
            "rngs": self.rngs,
        }
