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
    flat, _, grouped = _changes(rhs.shape, given)
    if grouped:
        rhs, given = _ungrouped(rhs, given), given | {"feature_group_count": 1}
    if _is_transposed(given):
        return _by_phases(lhs, rhs, given)
    if _changes(rhs.shape, given)[1]:
        lhs, given = _padded(lhs, given)
    if not flat:
        return _convolve(lhs, rhs, **given)
    out = _convolve(lhs[..., None], rhs[..., None], **_of_two_axes(given))
    return out[..., 0]


def _is_transposed(params: dict[str, Any]) -> bool:
    """Whether this is a convolution of a dilated map alone, as the gradient of the input of a strided one is."""
    return (
        max(params["lhs_dilation"], default=1) > 1
        and params["feature_group_count"] == params["batch_group_count"] == 1
        and all(step == 1 for name in ("window_strides", "rhs_dilation") for step in params[name])
    )


def _by_phases(lhs: Any, rhs: Any, params: dict[str, Any]) -> Any:
    """Return the convolution of a dilated map from the map as it is.

    Of a map dilated by d, the results at p, p + d, p + 2d… use every d-th number of the kernel alone: each p becomes
    features of its own, which then stand side by side. The dilated map would be d times as long and mostly zeros.
    """
    numbers, dilations = params["dimension_numbers"], params["lhs_dilation"]
    kernel = rhs.transpose(numbers.rhs_spec)
    out, inside, *sizes = kernel.shape
    lengths, edges, padding = [], [], []
    for axis, size, d, (low, high) in zip(numbers.lhs_spec[2:], sizes, dilations, params["padding"], strict=True):
        lengths.append((lhs.shape[axis] - 1) * d + 1 + low + high - size + 1)
        first, before = divmod(d - 1 - low, d)  # the first of the map that counts, zeros before the kernel
        taps = -(-(size + before) // d)
        edges.append((before, taps * d - size - before, 0))
        padding.append((-first, -(-lengths[-1] // d) - 1 + taps - lhs.shape[axis] + first))
    kernel = lax.pad(kernel, jnp.zeros((), kernel.dtype), [(0, 0, 0), (0, 0, 0), *edges])
    axes = range(len(sizes))
    taps_and_phases = [n for size, d in zip(kernel.shape[2:], dilations, strict=True) for n in (size // d, d)]
    kernel = jnp.flip(kernel.reshape(out, inside, *taps_and_phases), [3 + 2 * axis for axis in axes])
    kernel = kernel.transpose(0, *(3 + 2 * axis for axis in axes), 1, *(2 + 2 * axis for axis in axes))
    kernel = kernel.reshape(out * prod(dilations), inside, *taps_and_phases[::2])
    plain = tuple(range(kernel.ndim))
    found = _bind(
        lhs,
        kernel,
        **params
        | {
            "padding": tuple(padding),
            "lhs_dilation": (1,) * len(sizes),
            "dimension_numbers": lax.ConvDimensionNumbers(numbers.lhs_spec, plain, plain),
        },
    )
    batch, _, *counts = found.shape
    found = found.reshape(batch, out, *dilations, *counts)
    order = (position for axis in axes for position in (2 + len(sizes) + axis, 2 + axis))
    found = found.transpose(0, 1, *order)
    found = found.reshape(batch, out, *(count * d for count, d in zip(counts, dilations, strict=True)))
    found = found[(..., *map(slice, lengths))]
    return found.transpose([numbers.out_spec.index(axis) for axis in plain])


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
