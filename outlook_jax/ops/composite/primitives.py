"""How composite's primitives are defined, and lowered by platform."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from outlook_jax.ops.manual_axes import varying_axes


def define(
    name: str,
    run: Callable[..., Array],
    shape: Callable[..., Any],
    *,
    static: str | None = None,
    cpu: Callable[..., Array] | None = None,
    gpu: Callable[..., Array] | None = None,
) -> Any:
    """Return a primitive whose operands and result all have the batch as their first axis; it has no derivatives yet.

    Args:
        name: for those who read what was traced.
        run: computes it.
        shape: returns what `run` would, of operands that are known by shape and dtype alone.
        static: the one argument of both that is no array, given by keyword, if any.
        cpu: computes it on a CPU, if another way than `run` is better there. Each platform's way is chosen when a
            program is lowered, for several platforms at once too.
        gpu: likewise.
    """
    primitive: Any = Primitive(name)  # JAX does not type what defines a primitive
    primitive.def_impl(jax.jit(primitive.bind, static_argnames=static))
    primitive.def_abstract_eval(shape)
    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=False))
    for platform, way in (("cpu", cpu), ("gpu", gpu)):
        if way is not None:
            mlir.register_lowering(primitive, mlir.lower_fun(way, multiple_results=False), platform=platform)
    batching.primitive_batchers[primitive] = partial(_batched, primitive)
    return primitive


def _batched(primitive: Any, args: tuple[Array, ...], axes: tuple[Any, ...], **params: Any) -> Any:
    size = next(x.shape[axis] for x, axis in zip(args, axes, strict=True) if axis is not None)
    args = tuple(
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(args, axes, strict=True)
    )
    out = primitive.bind(*(x.reshape(-1, *x.shape[2:]) for x in args), **params)
    return out.reshape(size, -1, *out.shape[1:]), 0


def alike(*operands: Array) -> list[Array]:
    """Return the operands, varying over the same axes of a `jax.shard_map`.

    JAX does so for its own operations, and so the gradient of what did not vary is summed over these axes.
    """
    varying = [varying_axes(x) for x in operands]
    missing = [tuple(frozenset().union(*varying) - own) for own in varying]
    return [lax.pcast(x, axes, to="varying") if axes else x for x, axes in zip(operands, missing, strict=True)]


def apart(run: Callable[..., Array], result: Any, *operands: Array) -> Array:
    """Return run(*operands), which is like `result` in shape and dtype, in a computation of its own on a CPU.

    XLA fuses what is computed into what reads it, and computes it once for each of its readers; a transpose that reads
    it turns its loops inside out. It drops optimization barriers before it fuses, but it does not look into a
    conditional whose condition it cannot tell.
    """
    if any(x.size == 0 for x in operands):
        return run(*operands)
    # A slice and no flat index, for which devices that share the array would first gather all of it.
    first = lax.slice(operands[0], (0,) * operands[0].ndim, (1,) * operands[0].ndim).reshape(())
    bits = lax.bitcast_convert_type(first, f"uint{8 * first.dtype.itemsize}")
    # Always true. The other branch is there for its shape alone, and compiles in no time.
    return lax.cond(bits | 1 != 0, run, lambda x, *_: lax.full_like(x, 0, result.dtype, result.shape), *operands)
