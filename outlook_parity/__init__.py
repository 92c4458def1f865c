"""Verifier of PyTorch and JAX twins. Importing it imports no framework, and nothing else of this package."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from outlook_common.version import __version__
    from outlook_parity.api import verify
    from outlook_parity.core.check import Check, Noise
    from outlook_parity.load_weights import load_torch_weights
    from outlook_parity.mapping.entries import WeightEntry
    from outlook_parity.mapping.user import NameMap, read_name_map
    from outlook_parity.report.report import Report

__all__ = [
    "Check",
    "NameMap",
    "Noise",
    "Report",
    "WeightEntry",
    "__version__",
    "load_torch_weights",
    "read_name_map",
    "verify",
]

_MODULES = {
    "Check": "outlook_parity.core.check",
    "NameMap": "outlook_parity.mapping.user",
    "Noise": "outlook_parity.core.check",
    "Report": "outlook_parity.report.report",
    "WeightEntry": "outlook_parity.mapping.entries",
    "__version__": "outlook_common.version",
    "load_torch_weights": "outlook_parity.load_weights",
    "read_name_map": "outlook_parity.mapping.user",
    "verify": "outlook_parity.api",
}


def __getattr__(name: str) -> Any:
    # On demand: pytest loads the plugin at every start, and must not load the rest with it.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
