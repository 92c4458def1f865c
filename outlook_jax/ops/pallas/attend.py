"""The kernels as primitives that are each other's derivatives.

`attend` is linear in the value, and its transpose is the same kernel with the places of each window swapped. Along the
logits its derivative is `push`, whose transpose is the kernel `gram`. What is left, forward mode along the logits and
the derivatives of a softmax's derivative, runs on composite, or on the reference where that runs off a TPU.
"""

from collections.abc import Callable
from enum import Enum
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir
from jaxtyping import Float

from outlook_common.geometry import WindowGrid
from outlook_jax.ops.composite import sums as composite
from outlook_jax.ops.composite.primitives import alike, define
from outlook_jax.ops.pallas.interpret import is_interpreted
from outlook_jax.ops.reference import reference

Operands = tuple[Array, ...]


class OffTpu(Enum):
    """What computes the op where a program is lowered for another platform than a TPU."""

    REFUSE = "refuse"
    INTERPRET = "interpret"
    COMPOSITE = "composite"
    REFERENCE = "reference"


class How(NamedTuple):
    """What is no array: the grid, whether the places are swapped, what runs off a TPU, the reference's precision."""

    grid: WindowGrid
    swapped: bool
    off_tpu: OffTpu
    precision: lax.PrecisionLike = None


def pallas(
    value: Float[Array, "B H W N D"],
    logits: Float[Array, "B h w N KK KK"],
    dropout_mask: Float[Array, "B h w N KK KK"] | None,
    grid: WindowGrid,
    precision: lax.PrecisionLike = None,
    *,
    off_tpu: OffTpu | None = None,
) -> Float[Array, "B H W N D"]:
    """Return fold(softmax(logits) @ unfold(value)); operands as in `outlook_attention`, already checked.

    There is no matrix product, so `precision` changes nothing but what the reference does off a TPU: products and sums
    are exact to their dtype. None for `off_tpu` interprets the kernels where that is asked for, and else refuses.
    """
    if off_tpu is None:
        off_tpu = OffTpu.INTERPRET if is_interpreted() else OffTpu.REFUSE
    masks = () if dropout_mask is None else (dropout_mask,)
    return attend(value, logits, *masks, how=How(grid, swapped=False, off_tpu=off_tpu, precision=precision))


# The same by kernels where a program is lowered for a TPU, elsewhere by other means.
pallas_or_composite = partial(pallas, off_tpu=OffTpu.COMPOSITE)
pallas_or_reference = partial(pallas, off_tpu=OffTpu.REFERENCE)


def attend(value: Array, logits: Array, *masks: Array, how: How) -> Array:
    """Return outlook attention of `value`, or its transpose if `how.swapped`."""
    return _attend_p.bind(*alike(value, logits, *masks), how=how)


def push(direction: Array, value: Array, logits: Array, *masks: Array, how: How) -> Array:
    """Return the derivative of `attend` as the logits move in a direction."""
    return _push_p.bind(*alike(direction, value, logits, *masks), how=how)


def gram(cotangent: Array, value: Array, logits: Array, *masks: Array, how: How) -> Array:
    """Return the gradient of sum(attend(value, logits) * cotangent) by the logits, places not swapped."""
    return _gram_p.bind(*alike(cotangent, value, logits, *masks), how=how)


def _by_composite(value: Array, logits: Array, *masks: Array, how: How) -> Array:
    weights = composite.weights(logits, masks[0] if masks else None, value.dtype)
    weights = weights.swapaxes(2, 3) if how.swapped else weights
    return composite.mix(weights, value.astype(weights.dtype), how.grid).astype(value.dtype)


def _by_reference(value: Array, logits: Array, *masks: Array, how: How) -> Array:
    def attended(value: Array) -> Array:
        return reference(value, logits, masks[0] if masks else None, how.grid, how.precision)

    return jax.linear_transpose(attended, value)(value)[0] if how.swapped else attended(value)


def _by_operations(value: Array, logits: Array, *masks: Array, how: How) -> Array:
    """Return `attend` by what is no kernel."""
    by = _by_reference if how.off_tpu is OffTpu.REFERENCE else _by_composite
    return by(value, logits, *masks, how=how)


def _push_by_operations(direction: Array, value: Array, logits: Array, *masks: Array, how: How) -> Array:
    return jax.jvp(lambda x: _by_operations(value, x, *masks, how=how), (logits,), (direction,))[1]


def _gram_by_operations(cotangent: Array, value: Array, logits: Array, *masks: Array, how: How) -> Array:
    if how.off_tpu is OffTpu.REFERENCE:
        return jax.vjp(lambda x: _by_reference(value, x, *masks, how=how), logits)[1](cotangent)[0]

    # Not the derivative of `_by_composite`, which would lower a weighted sum that nothing reads.
    def weights(logits: Array) -> Array:
        return composite.weights(logits, masks[0] if masks else None, value.dtype)

    by_weight = composite.gram(cotangent.astype(value.dtype), value, how.grid)
    return jax.vjp(weights, logits)[1](by_weight)[0]


def _attend_kernel(*operands: Array, how: How, interpret: bool = False) -> Array:
    from outlook_jax.ops.pallas import launch

    return launch.mix(*operands, grid=how.grid, swapped=how.swapped, interpret=interpret)


def _gram_kernel(*operands: Array, how: How, interpret: bool = False) -> Array:
    from outlook_jax.ops.pallas import launch

    return launch.gram(*operands, grid=how.grid, interpret=interpret)


def _off_tpu(kernel: Callable[..., Array], by_operations: Callable[..., Array], *operands: Array, how: How) -> Array:
    if how.off_tpu is OffTpu.INTERPRET:
        return kernel(*operands, how=how, interpret=True)
    if how.off_tpu is OffTpu.REFUSE:
        return _absent_p.bind(*operands, kernel=partial(kernel, how=how))
    return by_operations(*operands, how=how)


def _refuse(ctx: Any, *_: Any, **__: Any) -> Any:
    raise NotImplementedError(
        f"implementation 'pallas' cannot run here: it is for TPUs, and this was lowered for "
        f"{' and '.join(ctx.platforms or ctx.module_context.platforms)}; "
        "within outlook_jax.ops.pallas.interpreted() it runs anywhere, slowly"
    )


# Stands for a kernel where there is no TPU; only who lowers it is told so.
_absent_p: Any = Primitive("outlook_pallas_absent")


def _absent_shape(*operands: Any, kernel: Callable[..., Array]) -> Any:
    like = jax.eval_shape(kernel, *operands)
    return operands[0].update(shape=like.shape, dtype=like.dtype)


_absent_p.def_abstract_eval(_absent_shape)
mlir.register_lowering(_absent_p, _refuse)


def _partitioned_by_xla(axes: Any) -> bool:
    """Return whether XLA splits a program among devices, which it cannot do with a kernel outside of `shard_map`."""
    manual = getattr(axes, "manual_axes", None)
    if manual is None:
        return bool(getattr(axes, "num_devices", 1) != 1)
    return bool(manual) and manual | set(axes.mesh.manual_axes) != frozenset(axes.mesh.axis_names)


def _define(
    name: str, kernel: Callable[..., Array], by_operations: Callable[..., Array], shape: Callable[..., Any]
) -> Any:
    """Return a primitive that runs a kernel on a TPU."""
    primitive = define(name, partial(_off_tpu, kernel, by_operations), shape, static="how")
    on_tpu, split = (mlir.lower_fun(way, multiple_results=False) for way in (kernel, by_operations))

    def lower(ctx: Any, *operands: Any, how: How) -> Any:
        has_choice = how.off_tpu in (OffTpu.COMPOSITE, OffTpu.REFERENCE)
        way = split if has_choice and _partitioned_by_xla(ctx.module_context.axis_context) else on_tpu
        return way(ctx, *operands, how=how)

    mlir.register_lowering(primitive, lower, platform="tpu")
    return primitive


_attend_p = _define("outlook_attend", _attend_kernel, _by_operations, lambda value, *_, how: value)
_push_p = define("outlook_push", _push_by_operations, lambda _, value, *__, how: value, static="how")
_gram_p = _define("outlook_logits_gradient", _gram_kernel, _gram_by_operations, lambda _, __, logits, *___, how: logits)


def _moves(tangent: Any) -> bool:
    return type(tangent) is not ad.Zero


def _jvp(
    op: Callable[..., Array],
    by_operations: Callable[..., Array],
    linear: int,
    primals: Operands,
    tangents: Any,
    how: How,
) -> tuple[Array, Array]:
    """Differentiate `op`, linear in each of its first operands; in the others as the operations without kernels are."""
    out = op(*primals, how=how)
    parts = [op(*primals[:i], tangents[i], *primals[i + 1 :], how=how) for i in range(linear) if _moves(tangents[i])]
    rest = tuple(map(ad.instantiate_zeros, tangents[linear:]))
    if any(map(_moves, tangents[linear:])):
        parts.append(jax.jvp(lambda *x: by_operations(*primals[:linear], *x, how=how), primals[linear:], rest)[1])
    return out, reduce(jnp.add, parts)


def _attend_jvp(primals: Operands, tangents: Any, *, how: How) -> tuple[Array, Array]:
    value, logits, *masks = primals
    parts = []
    if _moves(tangents[0]):
        parts.append(attend(tangents[0], logits, *masks, how=how))
    if _moves(tangents[1]):
        parts.append(push(tangents[1], *primals, how=how))
    if any(map(_moves, tangents[2:])):
        parts.append(jax.jvp(lambda m: _by_operations(value, logits, m, how=how), tuple(masks), tuple(tangents[2:]))[1])
    return attend(*primals, how=how), reduce(jnp.add, parts)


def _swap(how: How) -> How:
    return how._replace(swapped=not how.swapped)


def _attend_transpose(cotangent: Any, value: Any, *rest: Any, how: How) -> list[Any]:
    return [attend(cotangent, *rest, how=_swap(how)), *(None for _ in rest)]


def _push_transpose(cotangent: Any, direction: Any, value: Any, *rest: Any, how: How) -> list[Any]:
    nothing = [None for _ in rest]
    if isinstance(direction, ad.UndefinedPrimal):
        pair = (value, cotangent) if how.swapped else (cotangent, value)
        return [gram(*pair, *rest, how=how._replace(swapped=False)), None, *nothing]
    return [None, push(direction, cotangent, *rest, how=_swap(how)), *nothing]


def _gram_transpose(direction: Any, cotangent: Any, value: Any, *rest: Any, how: How) -> list[Any]:
    nothing = [None for _ in rest]
    if isinstance(cotangent, ad.UndefinedPrimal):
        return [push(direction, value, *rest, how=how), None, *nothing]
    return [None, push(direction, cotangent, *rest, how=_swap(how)), *nothing]


ad.primitive_jvps[_attend_p] = _attend_jvp
ad.primitive_jvps[_push_p] = lambda primals, tangents, *, how: _jvp(
    push, _push_by_operations, 2, primals, tangents, how
)
ad.primitive_jvps[_gram_p] = lambda primals, tangents, *, how: _jvp(
    gram, _gram_by_operations, 2, primals, tangents, how
)
ad.primitive_transposes[_attend_p] = _attend_transpose
ad.primitive_transposes[_push_p] = _push_transpose
ad.primitive_transposes[_gram_p] = _gram_transpose
