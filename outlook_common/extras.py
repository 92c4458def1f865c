"""Optional dependencies: an ImportError that names the extra to install."""

from importlib.util import find_spec


def require(module: str, *, extra: str, needed_by: str) -> None:
    """Raise an ImportError that names the extra to install unless `module` can be imported."""
    if find_spec(module) is None:
        raise ImportError(
            f"{needed_by} needs {module}, which is not installed; "
            f"install it with: pip install 'outlook-attention[{extra}]'",
            name=module,
        )
