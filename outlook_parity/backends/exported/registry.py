"""Which exported programs can stand in place of a twin. Imports a framework only for what is of its kind."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from outlook_parity.backends.exported.base import Exported


def _onnx(source: Any) -> Exported:
    from outlook_parity.backends.exported.onnx import OnnxFile

    return OnnxFile(source)


def _torch(source: Any) -> Exported:
    from outlook_parity.backends.exported.aotinductor import CompiledPackage, is_package
    from outlook_parity.backends.exported.torch_export import TorchProgram

    if isinstance(source, Path) and is_package(source):
        return CompiledPackage(source)
    return TorchProgram(source)


def _jax(source: Any) -> Exported:
    from outlook_parity.backends.exported.jax_export import JaxProgram

    return JaxProgram(source)


# By the suffix of a file. jax.export names none: this one is ours.
SUFFIXES: dict[str, Callable[[Any], Exported]] = {".onnx": _onnx, ".pt2": _torch, ".jax_export": _jax}
# By the type of an object, as (module, name).
_TYPES = {("torch.export", "ExportedProgram"): _torch, ("jax.export", "Exported"): _jax}


def is_program_file(name: str) -> bool:
    """Whether a name is that of a file with an exported program, by its suffix."""
    return Path(name).suffix in SUFFIXES


def as_exported(model: Any) -> Exported | None:
    """Return an exported program as one, None if `model` is none: a file, or what the frameworks' exports give.

    Raises:
        ValueError: a file has another suffix, or holds no such program.
        FileNotFoundError: there is no such file.
        ImportError: what runs it is not installed.
    """
    if isinstance(model, str | Path):
        path = Path(model)
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: an exported program must be one of {', '.join(SUFFIXES)}")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there is no such file")
        return SUFFIXES[path.suffix](path)
    for (module, name), make in _TYPES.items():
        kind = getattr(sys.modules.get(module), name, None)
        if isinstance(kind, type) and isinstance(model, kind):
            return make(model)
    return None
