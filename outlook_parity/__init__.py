"""Verifier of PyTorch and JAX twins. Importing it imports no framework, and nothing else of this package."""

from typing import TYPE_CHECKING

from outlook_common.lazy import lazily
from outlook_common.version import __version__

if TYPE_CHECKING:
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

if not TYPE_CHECKING:  # a type checker would take any name
    # Pytest loads the plugin at every start, and must not load the rest with it.
    __getattr__ = lazily(
        __name__,
        {
            "Check": "core.check",
            "NameMap": "mapping.user",
            "Noise": "core.check",
            "Report": "report.report",
            "WeightEntry": "mapping.entries",
            "load_torch_weights": "load_weights",
            "read_name_map": "mapping.user",
            "verify": "api",
        },
    )
