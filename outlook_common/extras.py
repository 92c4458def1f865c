"""Optional dependencies: an ImportError that names the smallest extras to install."""

from importlib.util import find_spec

# Module -> the smallest extra that brings it; any other is installed by its own name.
EXTRAS = {
    "torch": "torch",
    "jax": "jax",
    "flax": "jax",
    "optax": "jax",
    "orbax.checkpoint": "jax",
    "tensorstore": "jax",
    "PIL": "images",
    "sklearn": "photos",
    "matplotlib": "plots",
    "h5py": "h5",
}


def require(*modules: str, needed_by: str) -> None:
    """Raise an ImportError that says what to install unless all of these modules can be imported."""
    missing = [module for module in modules if not is_installed(module)]
    if missing:
        are, them = ("is", "it") if len(missing) == 1 else ("are", "them")
        extras = ",".join(sorted({EXTRAS[module] for module in missing if module in EXTRAS}))
        packages = [f"'outlook-attention[{extras}]'"] if extras else []
        packages += [module for module in missing if module not in EXTRAS]
        raise ImportError(
            f"{needed_by} needs {' and '.join(missing)}, which {are} not installed; "
            f"install {them} with: pip install {' '.join(packages)}",
            name=missing[0],
        )


def is_installed(module: str) -> bool:
    """Whether a module can be imported, by its name alone."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it
        return False
