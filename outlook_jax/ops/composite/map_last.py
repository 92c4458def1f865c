"""The map, moved behind the places of the windows and back."""

from functools import partial
from math import prod
from typing import Any

import jax
from jax import Array
from jax.interpreters import ad
from jaxtyping import Float

from outlook_jax.ops.composite.primitives import apart, define


def map_last(x: Float[Array, "B h w N KK KK"]) -> Float[Array, "B N KK KK h w"]:
    """Return `x` with its map last.

    Its gradient is moved back once for all that read it. Logits come of a linear layer, whose input, weight and bias
    each read their gradient; XLA would move it thrice, which took half the time of a training step on a small map.
    """
    return _map_last_p.bind(x, back=False)


def _moved(x: Array, *, back: bool) -> Array:
    return x.transpose(_ORDER[back])


def _moved_on_cpu(x: Array, *, back: bool) -> Array:
    return (
        apart(partial(_moved_flat, back=True), _moved_shape(jax.typeof(x), back=True), x)
        if back
        else _moved_flat(x, back=False)
    )


def _moved_flat(x: Array, *, back: bool) -> Array:
    # XLA compiles a transpose of six axes for 0.2 s on a CPU, of three for a fifth of that. A TPU would move each axis.
    first = 4 if back else 3
    flat = x.reshape(len(x), prod(x.shape[1:first]), prod(x.shape[first:]))
    return flat.swapaxes(1, 2).reshape([x.shape[axis] for axis in _ORDER[back]])


def _moved_shape(x: Any, *, back: bool) -> Any:
    return x.update(shape=tuple(x.shape[axis] for axis in _ORDER[back]))


_ORDER = {False: (0, 3, 4, 5, 1, 2), True: (0, 4, 5, 1, 2, 3)}
_map_last_p = define("outlook_map_last", _moved, _moved_shape, static="back", cpu=_moved_on_cpu)
_define_derivative: Any = ad.deflinear2
_define_derivative(_map_last_p, lambda cotangent, _, *, back: [_map_last_p.bind(cotangent, back=not back)])
