"""Versions of what computed, for reports and traces. Imports no framework."""

import platform
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """Return the versions of Python, NumPy and the frameworks, and the platform."""
    packages = {}
    for name in ("numpy", "torch", "jax", "jaxlib", "flax"):
        with suppress(PackageNotFoundError):
            # An imported package also tells its build: 2.11.0+cu130.
            packages[name] = getattr(sys.modules.get(name), "__version__", None) or version(name)
    return {"python": platform.python_version(), "platform": platform.platform(), **packages}
