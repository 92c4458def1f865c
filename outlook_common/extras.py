"""Optional dependencies: an ImportError that names the extra to install."""

from importlib.util import find_spec


def require(module: str, *, extra: str | None, needed_by: str) -> None:
    """Raise an ImportError that says what to install unless `module` can be imported: an extra, or itself."""
    if find_spec(module) is None:
        package = f"'outlook-attention[{extra}]'" if extra else module
        raise ImportError(
            f"{needed_by} needs {module}, which is not installed; install it with: pip install {package}",
            name=module,
        )
