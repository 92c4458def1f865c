"""What both frameworks can compute on here: devices, and products in TF32."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import torch

from outlook_parity.backends.jax.placement import few_devices
from outlook_parity.backends.jax.settings import jax_absence, jax_device, jax_products, jax_products_absence
from outlook_parity.backends.torch.settings import torch_absence, torch_device, torch_products, torch_products_absence
from outlook_parity.core.precision import PRECISIONS


@dataclass(frozen=True)
class Availability:
    """What can be computed on one kind of device.

    Attributes:
        absence: why nothing can, or None.
        missing_products: precision -> why its products cannot be had there.
        environment: the devices' names, and how each framework computes products, for the report.
    """

    absence: str | None
    missing_products: dict[str, str]
    environment: dict[str, str]


def availability(device: str, dtypes: Collection[str], devices: int | None = None) -> Availability:
    """Return what both frameworks can compute on "cpu", "gpu" or "tpu" in these precisions, JAX on so many devices."""
    if absence := jax_absence(device) or torch_absence(device) or few_devices(device, devices):
        return Availability(absence, {}, {})
    reasons = {dtype: jax_products_absence(device, dtype) or torch_products_absence(device, dtype) for dtype in dtypes}
    missing = {dtype: reason for dtype, reason in reasons.items() if reason}
    return Availability(None, missing, _device_names(device) | _products(dtypes))


def _device_names(device: str) -> dict[str, str]:
    place = torch_device(device)
    return {
        "torch device": torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu",
        "jax device": jax_device(device).device_kind,
    }


def _products(dtypes: Collection[str]) -> dict[str, str]:
    """Return how each framework is set to compute products, for each precision that is kept in float32."""
    settings: dict[str, Callable[[str], str]] = {"torch": torch_products, "jax": jax_products}
    return {
        f"{framework} products in {dtype}": setting(dtype)
        for dtype in dtypes
        if PRECISIONS[dtype].storage == np.float32
        for framework, setting in settings.items()
    }
