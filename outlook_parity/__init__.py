"""The verifier: whether two twins compute the same thing. Importing it imports nothing else, a framework least."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from outlook_parity.checks import Check, Noise
    from outlook_parity.given import Given
    from outlook_parity.report import Report
    from outlook_parity.verification import load_torch_weights, verify

__all__ = ["Check", "Given", "Noise", "Report", "load_torch_weights", "verify"]

_HOMES = {
    "Check": "checks",
    "Given": "given",
    "Noise": "checks",
    "Report": "report",
    "load_torch_weights": "verification",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    # When it is asked for: pytest loads the plugin at every start, and must not load the rest with it.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
