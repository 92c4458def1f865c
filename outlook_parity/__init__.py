"""Verifier of PyTorch and JAX twins. Importing it imports no framework, and nothing else of this package."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from outlook_parity.api import verify
    from outlook_parity.core.check import Check, Noise
    from outlook_parity.load_weights import load_torch_weights
    from outlook_parity.mapping.entries import WeightEntry
    from outlook_parity.mapping.user import NameMap, read_name_map
    from outlook_parity.report.report import Report

__all__ = ["Check", "NameMap", "Noise", "Report", "WeightEntry", "load_torch_weights", "read_name_map", "verify"]

_MODULES = {
    "Check": "core.check",
    "NameMap": "mapping.user",
    "Noise": "core.check",
    "Report": "report.report",
    "WeightEntry": "mapping.entries",
    "load_torch_weights": "load_weights",
    "read_name_map": "mapping.user",
    "verify": "api",
}


def __getattr__(name: str) -> Any:
    # On demand: pytest loads the plugin at every start, and must not load the rest with it.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
