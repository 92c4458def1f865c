"""Axes of a `jax.shard_map` that arrays vary over, in every supported version of JAX.

JAX 0.10 renamed `vma`, the set of these axes, to `manual_axis_type`, of which it is the part `varying`.
"""

from inspect import signature
from typing import Any

import jax
from jax import Array

_NAME = "manual_axis_type" if "manual_axis_type" in signature(jax.ShapeDtypeStruct).parameters else "vma"


def varying_axes(x: Array) -> frozenset[Any]:
    """Return the axes that an array varies over."""
    found: Any = getattr(jax.typeof(x), _NAME)
    axes: frozenset[Any] = found if _NAME == "vma" else found.varying
    return axes


def struct_like(x: Array) -> Any:
    """Return the shape, dtype and varying axes of an array."""
    axes = {_NAME: getattr(jax.typeof(x), _NAME)}
    return jax.ShapeDtypeStruct(x.shape, x.dtype, **axes)  # type: ignore[no-untyped-call]
