"""The verifier: whether two twins compute the same thing. Importing it imports nothing else, a framework least."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from outlook_parity.api import load_torch_weights, verify
    from outlook_parity.core.check import Check, Noise
    from outlook_parity.mapping.user import NameMap
    from outlook_parity.report.report import Report

__all__ = ["Check", "NameMap", "Noise", "Report", "load_torch_weights", "verify"]

_HOMES = {
    "Check": "core.check",
    "NameMap": "mapping.user",
    "Noise": "core.check",
    "Report": "report.report",
    "load_torch_weights": "api",
    "verify": "api",
}


def __getattr__(name: str) -> Any:
    # When it is asked for: pytest loads the plugin at every start, and must not load the rest with it.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
