"""Softmax and its derivative as primitives: one kernel each on a GPU."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.interpreters import ad
from jaxtyping import Float

from outlook_jax.ops.composite.primitives import alike, define

_PLACES = 3  # the axis that the softmax runs over


def softmax(logits: Float[Array, "B N KK KK h w"]) -> Float[Array, "B N KK KK h w"]:
    """Return the softmax over the second of both axes of places."""
    return _softmax_p.bind(logits)


def _tangent(weights: Array, tangent: Array) -> Array:
    return _tangent_p.bind(*alike(weights, tangent))


def _softmax(logits: Array) -> Array:
    return jax.nn.softmax(logits, axis=_PLACES)


def _softmax_tangent(weights: Array, tangent: Array) -> Array:
    return weights * (tangent - _total(weights * tangent))


def _total(x: Array) -> Array:
    return x.sum(axis=_PLACES, keepdims=True)


# XLA's GPU compiler cuts a program wherever an element needs a reduction of its whole row, or takes several rows for
# one kernel, depending on what surrounds it. With few places it takes less time to go through the row for each element.
# Both run where the places come last, as the logits lie in memory: two transposes in a row cancel each other.


def _softmax_by_element(logits: Float[Array, "B N KK KK h w"]) -> Float[Array, "B N KK KK h w"]:
    logits = _map_first(logits)
    # A logit of minus infinity has no weight, as its difference from any finite one is that of the lowest number.
    own = jnp.maximum(logits[..., None], np.finfo(logits.dtype).min)
    return _map_last(1 / jnp.exp(logits[..., None, :] - own).sum(axis=-1))


def _softmax_tangent_by_element(
    weights: Float[Array, "B N KK KK h w"], tangent: Float[Array, "B N KK KK h w"]
) -> Float[Array, "B N KK KK h w"]:
    weights, tangent = _map_first(weights), _map_first(tangent)
    # The weights of a row sum up to 1.
    differences = tangent[..., None] - tangent[..., None, :]
    return _map_last(weights * (weights[..., None, :] * differences).sum(axis=-1))


def _map_first(x: Float[Array, "B N KK KK h w"]) -> Float[Array, "B h w N KK KK"]:
    return x.transpose(0, 4, 5, 1, 2, 3)


def _map_last(x: Float[Array, "B h w N KK KK"]) -> Float[Array, "B N KK KK h w"]:
    return x.transpose(0, 3, 4, 5, 1, 2)


_softmax_p = define("outlook_softmax", _softmax, lambda logits: logits, gpu=_softmax_by_element)
_tangent_p = define(
    "outlook_softmax_tangent", _softmax_tangent, lambda weights, tangent: tangent, gpu=_softmax_tangent_by_element
)


def _softmax_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    weights = softmax(*primals)
    return weights, _tangent(weights, *tangents)


def _tangent_of_weights(change: Array, weights: Array, tangent: Array) -> Array:
    return change * (tangent - _total(weights * tangent)) - weights * _total(change * tangent)


_jvps: Any = ad.primitive_jvps
_jvps[_softmax_p] = _softmax_jvp
_define_jvp: Any = ad.defjvp
_define_jvp(_tangent_p, _tangent_of_weights, lambda change, weights, _: _tangent(weights, change))
# The derivative is linear in the tangent, and symmetric.
_transposes: Any = ad.primitive_transposes
_transposes[_tangent_p] = lambda cotangent, weights, _: (
    None,
    cotangent if isinstance(cotangent, ad.Zero) else _tangent(weights, cotangent),
)
