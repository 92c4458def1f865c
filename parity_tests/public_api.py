"""Every public name of the packages: `python -m parity_tests.public_api > parity_tests/public_api.txt`."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIST = Path(__file__).with_name("public_api.txt")

MODULES = (
    "outlook_common",
    "outlook_common.config",
    "outlook_common.images",
    "outlook_common.mixing",
    "outlook_common.models",
    "outlook_common.token_labels",
    "outlook_common.weights",
    "outlook_jax",
    "outlook_jax.linen",
    "outlook_jax.losses",
    "outlook_parity",
    "outlook_torch",
    "outlook_torch.losses",
)


def _source(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _assigned(statement: ast.stmt) -> list[str]:
    match statement:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Assign(targets=targets):
            return [target.id for target in targets if isinstance(target, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
    return []


def names(module: str) -> list[str]:
    """Return a module's `__all__`, or what it defines under names without an underscore."""
    body = ast.parse(_source(module).read_text()).body
    for statement in body:
        if "__all__" in _assigned(statement):
            return sorted(ast.literal_eval(statement.value))
    return sorted(name for statement in body for name in _assigned(statement) if not name.startswith("_"))


def public_names() -> list[str]:
    return [f"{module}.{name}" for module in MODULES for name in names(module)]


if __name__ == "__main__":
    print(*public_names(), sep="\n")
