"""Where JAX computes, and how exactly: devices, and the global settings that are pinned meanwhile."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np

from outlook_parity.core.precision import PRECISIONS, Products, absence_of_products


def jax_device(device: str) -> jax.Device:
    """Return JAX's first device of this kind; a RuntimeError if it has none."""
    return jax.devices(device)[0]


def jax_absence(device: str) -> str | None:
    """Return why JAX cannot run on this kind of device here, or None if it can."""
    try:
        jax_device(device)
    except RuntimeError as error:
        return f"JAX has no {device} here ({str(error).splitlines()[0]})"
    return None


def jax_products_absence(device: str, dtype: str) -> str | None:
    """Return why JAX's products are not in this precision on this kind of device, or None if they are."""
    place = jax_device(device)

    def multiply(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        with pinned(dtype, place):
            return np.asarray(jnp.matmul(jax.device_put(one, place), jax.device_put(other, place)))

    return absence_of_products(f"JAX on {device}", dtype, multiply)


def jax_products(dtype: str) -> str:
    """Return how JAX is told to compute products in this precision, as it says itself."""
    with pinned(dtype, jax_device("cpu")):
        return f"jax_default_matmul_precision {jax.config.jax_default_matmul_precision}"  # type: ignore[attr-defined]


_PRODUCTS: dict[Products, str] = {"full": "highest", "tf32": "tensorfloat32"}


@contextmanager
def pinned(dtype: str, device: jax.Device) -> Iterator[None]:
    """Compute in a precision with every global setting pinned, the x64 mode off below float64, and put them back."""
    with ExitStack() as settings:
        settings.enter_context(jax.enable_x64(dtype == "float64"))
        settings.enter_context(jax.default_matmul_precision(_PRODUCTS[PRECISIONS[dtype].products]))
        settings.enter_context(jax.default_device(device))
        settings.enter_context(jax.debug_nans(False))
        if dtype == "float64":
            settings.enter_context(patch.object(jax.nn, "dot_product_attention", _exact_attention))
        yield


_ROUNDED_ATTENTION = jax.nn.dot_product_attention


def _exact_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    **options: Any,
) -> Any:
    """Do what JAX's own attention does in the dtype of its operands: JAX's rounds its softmax to float32, whatever they
    are, and so would hide in float64 what the rounding of a lower precision hides.
    """
    if query.ndim != 4 or any(option is not None for option in options.values()):
        return _ROUNDED_ATTENTION(query, key, value, bias, mask, scale=scale, is_causal=is_causal, **options)
    key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))  # of grouped queries
    logits = jnp.einsum("BTND,BSND->BNTS", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits += bias
    if is_causal:
        causal = jnp.tril(jnp.ones(logits.shape[-2:], bool))
        mask = causal if mask is None else mask & causal
    if mask is not None:
        logits = jnp.where(mask, logits, -0.7 * float(np.finfo(np.float32).max))  # as JAX does
    return jnp.einsum("BNTS,BSND->BTND", jax.nn.softmax(logits, axis=-1), value)
