"""JAX's devices, and pinned global settings."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

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
    """Return why JAX cannot compute products in this precision on this kind of device, or None if it can."""
    place = jax_device(device)

    def multiply(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        with pinned(dtype, place):
            return np.asarray(jnp.matmul(jax.device_put(one, place), jax.device_put(other, place)))

    return absence_of_products(f"JAX on {device}", dtype, multiply)


def jax_products(dtype: str) -> str:
    """Return JAX's own setting for products in this precision."""
    with pinned(dtype, jax_device("cpu")):
        return f"jax_default_matmul_precision {jax.config.jax_default_matmul_precision}"  # type: ignore[attr-defined]


_PRODUCTS: dict[Products, str] = {"full": "highest", "tf32": "tensorfloat32"}


@contextmanager
def pinned(dtype: str, device: jax.Device) -> Iterator[None]:
    """Compute in a precision with every global setting pinned (x64 off below float64), then restore them."""
    with ExitStack() as settings:
        settings.enter_context(jax.enable_x64(dtype == "float64"))
        settings.enter_context(jax.default_matmul_precision(_PRODUCTS[PRECISIONS[dtype].products]))
        settings.enter_context(jax.default_device(device))
        settings.enter_context(jax.debug_nans(False))
        yield
