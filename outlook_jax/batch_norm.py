"""Batch normalisation with PyTorch's running variance (unbiased; that of Flax is biased)."""

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax import Array, lax
from jaxtyping import Float

from outlook_common.constants import BATCH_NORM_MOMENTUM, NORM_EPSILON
from outlook_jax.ops.promotion import along_last_axis, at_least_float32

# Of `jax.shard_map` or `jax.vmap`.
AxisNames = str | tuple[str, ...] | None


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
        axis_name: of `jax.shard_map` or `jax.vmap`: statistics are those of the batch of all devices along it, as
            Flax's are. Without, a device inside `shard_map` takes its own; under `jax.jit` alone statistics always are
            those of the whole batch, however it is sharded.
        ghost_batches: in how many parts, one after the other, the batch is normalised, each by its own statistics, as
            the ranks of PyTorch's DistributedDataParallel and FSDP do. The running ones follow the first part, as
            DistributedDataParallel's follow rank 0.
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
        axis_name: AxisNames = None,
        ghost_batches: int = 1,
    ) -> None:
        if ghost_batches < 1:
            raise ValueError(f"ghost_batches must be at least 1, got {ghost_batches}")
        if ghost_batches > 1 and axis_name is not None:
            raise ValueError(f"ghost_batches={ghost_batches} takes statistics apart, axis_name={axis_name!r} together")
        self.epsilon = epsilon
        self.momentum = momentum
        self.dtype = dtype
        self.use_running_average = use_running_average
        self.axis_name = axis_name
        self.ghost_batches = ghost_batches
        statistics_dtype = at_least_float32(param_dtype)
        self.scale = nnx.Param(jnp.ones(features, param_dtype))
        self.bias = nnx.Param(jnp.zeros(features, param_dtype))
        self.mean = nnx.BatchStat(jnp.zeros(features, statistics_dtype))
        self.var = nnx.BatchStat(jnp.ones(features, statistics_dtype))
        self.num_batches_tracked = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Normalise each channel; in training, update the running statistics.

        Raises:
            ValueError: in training, when a channel has a single value, which has no variance; or the batch has no
                `ghost_batches` equal parts.
        """
        dtype = self.dtype or jnp.promote_types(x.dtype, self.scale.dtype)
        wide = at_least_float32(dtype)
        shape, x = x.shape, x.astype(dtype).astype(wide)
        if self.use_running_average:
            mean, variance = self.mean[...], self.var[...]
        else:
            x = self._in_parts(x)
            mean, variance = self._batch_statistics(x)
        factor = _beside(self.scale[...].astype(wide), variance)
        scale = lax.rsqrt(variance.astype(wide) + self.epsilon) * factor
        mean, scale, bias = (_beside(p.astype(wide), x) for p in (mean, scale, self.bias[...]))
        return ((x - mean) * scale + bias).astype(dtype).reshape(shape)

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Set the mode for `nnx.view`, as `nnx.BatchNorm` does.

        Args:
            use_running_average: True normalises by the running statistics; None leaves it as it is.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def _in_parts(self, x: Float[Array, "B H W C"]) -> Float[Array, "..."]:
        """Return the batch as it is, or (parts, B / parts, H, W, C)."""
        parts = self.ghost_batches
        if len(x) % parts:
            raise ValueError(f"a batch of {len(x)} has no {parts} equal parts (ghost_batches={parts})")
        return x if parts == 1 else x.reshape(parts, len(x) // parts, *x.shape[1:])

    def _batch_statistics(self, x: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Return mean and biased variance, of shape (C,) or, of parts of the batch, (parts, 1, 1, 1, C)."""
        parts = self.ghost_batches
        devices = 1 if self.axis_name is None else lax.axis_size(self.axis_name)
        values = x.size // x.shape[-1] // parts * devices
        if values < 2:
            raise ValueError(f"batch normalisation in training needs 2 values per channel, got shape {x.shape}")
        axes, apart = tuple(range(parts > 1, x.ndim - 1)), parts > 1
        mean = self._over_devices(x.mean(axes, keepdims=apart))
        variance = self._over_devices(jnp.square(x - _beside(mean, x)).mean(axes, keepdims=apart))
        for statistic, batch in ((self.mean, mean), (self.var, variance * (values / (values - 1)))):
            old, first = statistic[...], batch[0].reshape(-1) if apart else batch
            updated = (1 - self.momentum) * old + self.momentum * first.astype(old.dtype)
            statistic[...] = lax.stop_gradient(updated)
        self.num_batches_tracked[...] = self.num_batches_tracked[...] + 1
        return mean, variance

    def _over_devices(self, x: Array) -> Array:
        if self.axis_name is None:
            return x
        mean: Array = lax.pmean(x, self.axis_name)  # type: ignore[no-untyped-call]
        return mean


def _beside(p: Array, x: Array) -> Array:
    """Return one number per channel, or one per part and channel, with as many axes as `x`."""
    return along_last_axis(p, x.ndim) if p.ndim == 1 else p
