"""Convolutions in float64 as such that XLA computes by products of matrices on a CPU.

Others are plain loops there, a hundred times slower without the optimizations of LLVM: along one axis, in groups, of a
dilated map, with so much padding that the map grows. All but those along three axes are the same sums, written anew.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive

_CONVOLUTION = lax.conv_general_dilated_p

# Numbers of a kernel whose groups are written as one: it has zeros between them.
MOST_IN_KERNEL = 1 << 22


@contextmanager
def as_products() -> Iterator[None]:
    """Write what convolutions are traced or run meanwhile in float64 as those that XLA has products of matrices for."""
    with patch.object(_CONVOLUTION, "bind", _bind):
        yield


def are_loops(kernel: tuple[int, ...], params: dict[str, Any]) -> bool:
    """Whether a convolution is computed by plain loops all the same.

    Args:
        kernel: the shape of the kernel.
        params: of the primitive.
    """
    groups = params["feature_group_count"]
    return len(params["window_strides"]) > 2 or (
        not _is_depthwise(kernel, params) and groups > 1 and prod(kernel) * groups > MOST_IN_KERNEL
    )


def _is_depthwise(kernel: tuple[int, ...], params: dict[str, Any]) -> bool:
    out, inside = params["dimension_numbers"].rhs_spec[:2]
    return kernel[inside] == 1 and kernel[out] == params["feature_group_count"]


def _bind(lhs: Any, rhs: Any, **params: Any) -> Any:
    # The class's method may have been replaced to lift casts: so the number of bits is not that of the operands.
    if not jax.config.jax_enable_x64 or are_loops(rhs.shape, params) or not any(_changes(rhs.shape, params)):  # type: ignore[attr-defined]
        return _convolve(lhs, rhs, **params)
    return _rewritten(lhs, rhs, params=tuple(params.items()))


def _convolve(lhs: Any, rhs: Any, **params: Any) -> Any:
    return Primitive.bind(_CONVOLUTION, lhs, rhs, **params)  # type: ignore[no-untyped-call]


def _changes(kernel: tuple[int, ...], params: dict[str, Any]) -> tuple[bool, bool, bool]:
    """Return whether an axis is added, whether the map is padded before, and whether groups become one."""
    sizes = [kernel[axis] for axis in params["dimension_numbers"].rhs_spec[2:]]
    reach = [(size - 1) * dilation for size, dilation in zip(sizes, params["rhs_dilation"], strict=True)]
    padded = any(
        dilation > 1 or min(padding) < 0 or sum(padding) > most
        for dilation, padding, most in zip(params["lhs_dilation"], params["padding"], reach, strict=True)
    )
    grouped = params["feature_group_count"] > 1 and not _is_depthwise(kernel, params)
    return len(sizes) == 1, padded, grouped


@partial(jax.jit, static_argnames="params")
def _rewritten(lhs: Any, rhs: Any, *, params: tuple[tuple[str, Any], ...]) -> Any:
    given = dict(params)
    flat, padded, grouped = _changes(rhs.shape, given)
    if padded:
        lhs, given = _padded(lhs, given)
    if grouped:
        rhs, given = _ungrouped(rhs, given), given | {"feature_group_count": 1}
    if not flat:
        return _convolve(lhs, rhs, **given)
    out = _convolve(lhs[..., None], rhs[..., None], **_of_two_axes(given))
    return out[..., 0]


def _padded(lhs: Any, params: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the map with its padding and dilation, and the parameters without."""
    config = [(0, 0, 0)] * lhs.ndim
    axes = params["dimension_numbers"].lhs_spec[2:]
    for axis, dilation, (low, high) in zip(axes, params["lhs_dilation"], params["padding"], strict=True):
        config[axis] = (low, high, dilation - 1)
    # XLA would make it the convolution's padding again.
    lhs = lax.optimization_barrier(lax.pad(lhs, jnp.zeros((), lhs.dtype), config))  # type: ignore[no-untyped-call]
    return lhs, params | {"padding": ((0, 0),) * len(axes), "lhs_dilation": (1,) * len(axes)}


def _ungrouped(rhs: Any, params: dict[str, Any]) -> Any:
    """Return the kernel of all groups: theirs on the diagonal, zeros elsewhere."""
    groups = params["feature_group_count"]
    first = params["dimension_numbers"].rhs_spec[:2]
    blocks = jnp.moveaxis(rhs, first, (0, 1))
    out, inside, *sizes = blocks.shape
    blocks = blocks.reshape(groups, out // groups, 1, inside, *sizes)
    diagonal = jnp.eye(groups, dtype=bool).reshape(groups, 1, groups, *(1 for _ in (inside, *sizes)))
    whole = jnp.where(diagonal, blocks, jnp.zeros((), rhs.dtype)).reshape(out, groups * inside, *sizes)
    return jnp.moveaxis(whole, (0, 1), first)


def _of_two_axes(params: dict[str, Any]) -> dict[str, Any]:
    """Return parameters for maps and kernels with one more axis, the last, of length 1."""
    numbers = params["dimension_numbers"]
    added = {"window_strides": 1, "padding": (0, 0), "lhs_dilation": 1, "rhs_dilation": 1}
    return {
        **params,
        **{name: (*params[name], value) for name, value in added.items()},
        "dimension_numbers": lax.ConvDimensionNumbers(*((*spec, 3) for spec in numbers)),
    }
