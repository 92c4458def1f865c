"""Batch normalisation with PyTorch's running variance (unbiased; that of Flax is biased)."""

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax import Array, lax
from jaxtyping import Float

from outlook_common.constants import BATCH_NORM_MOMENTUM, NORM_EPSILON
from outlook_jax.promotion import along_last_axis, at_least_float32


class BatchNorm(nnx.Module):
    """Batch normalisation over all axes but the last, with PyTorch's semantics.

    In training the batch is normalised by its own mean and biased variance, and the running statistics move towards
    its mean and *unbiased* variance, which Flax's layer leaves biased. Statistics are computed in float32 at least.

    Args:
        features: C, the channels.
        epsilon: added to the variance.
        momentum: the weight of the batch in the running statistics: PyTorch's 0.1 is Flax's 0.9.
        dtype: of the result; None means that of input and parameters together.
        param_dtype: of scale and bias.
        use_running_average: True normalises by the running statistics, as `model.eval()` does.
    """

    def __init__(
        self,
        features: int,
        epsilon: float = NORM_EPSILON,
        momentum: float = BATCH_NORM_MOMENTUM,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_running_average: bool = False,
    ) -> None:
        self.epsilon = epsilon
        self.momentum = momentum
        self.dtype = dtype
        self.use_running_average = use_running_average
        statistics_dtype = at_least_float32(param_dtype)
        self.scale = nnx.Param(jnp.ones(features, param_dtype))
        self.bias = nnx.Param(jnp.zeros(features, param_dtype))
        self.mean = nnx.BatchStat(jnp.zeros(features, statistics_dtype))
        self.var = nnx.BatchStat(jnp.ones(features, statistics_dtype))
        self.num_batches_tracked = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Normalise each channel; in training, update the running statistics.

        Raises:
            ValueError: in training, when a channel has a single value, which has no variance.
        """
        dtype = self.dtype or jnp.promote_types(x.dtype, self.scale.dtype)
        wide = at_least_float32(dtype)
        x = x.astype(dtype).astype(wide)
        if self.use_running_average:
            mean, variance = self.mean[...], self.var[...]
        else:
            mean, variance = self._batch_statistics(x)
        scale = lax.rsqrt(variance.astype(wide) + self.epsilon) * self.scale[...].astype(wide)
        mean, scale, bias = (along_last_axis(p.astype(wide), x.ndim) for p in (mean, scale, self.bias[...]))
        return ((x - mean) * scale + bias).astype(dtype)

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Set the mode for `nnx.view`, as `nnx.BatchNorm` does.

        Args:
            use_running_average: True normalises by the running statistics; None leaves it as it is.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def _batch_statistics(self, x: Float[Array, "B H W C"]) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
        values = x.size // x.shape[-1]
        if values < 2:
            raise ValueError(f"batch normalisation in training needs 2 values per channel, got shape {x.shape}")
        axes = tuple(range(x.ndim - 1))
        mean = x.mean(axes)
        variance = jnp.square(x - along_last_axis(mean, x.ndim)).mean(axes)
        for statistic, batch in ((self.mean, mean), (self.var, variance * (values / (values - 1)))):
            old = statistic[...]
            updated = (1 - self.momentum) * old + self.momentum * batch.astype(old.dtype)
            statistic[...] = lax.stop_gradient(updated)
        self.num_batches_tracked[...] = self.num_batches_tracked[...] + 1
        return mean, variance
