"""A user's models and inputs: factories by name, arrays from files."""

import importlib
import re
import sys
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def load_factory(name: str, option: str) -> Any:
    """Return what a factory, "package.module:factory", makes; modules in the current folder are found too.

    Raises:
        ValueError: the name has another form, or there is no such module or factory.
    """
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(f"{option} must be package.module:factory, got {name!r}")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise  # something that their module needs, and that its name says
        raise ValueError(f"{option}: there is no module {module_name!r} here") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(
            f"{option}: {module_name} has no factory {attribute!r}; it has {', '.join(functions) or 'none'}"
        )
    try:
        return factory()
    except Exception as error:  # theirs, whatever it is
        where = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"{option}: {name}() fails: {what} ({where.filename}, line {where.lineno})") from error


def read_inputs(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a .safetensors, .npz or .npy file by name, in the order of the arguments.

    That is the order of their names, numbers in them by size: 0, 1, … 10, or a_images, b_mask.

    Raises:
        ValueError: the suffix is another one, or the file is damaged or has no array.
        OSError: it cannot be read.
    """
    if path.suffix not in READERS:
        raise ValueError(f"{path}: the inputs must be one of {', '.join(READERS)}, got {path.suffix or 'no suffix'}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    arrays = READERS[path.suffix](path)
    if not arrays:
        raise ValueError(f"{path}: there is no array in it")
    return {name: arrays[name] for name in sorted(arrays, key=_natural)}


def _natural(name: str) -> list[tuple[bool, int, str]]:
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name) if part]


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return load(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_numpy(path: Path) -> dict[str, np.ndarray]:
    try:
        loaded = np.load(path, allow_pickle=False)
        return {"input": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: no NumPy file: {error}") from error


READERS: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
    ".safetensors": _read_safetensors,
    ".npz": _read_numpy,
    ".npy": _read_numpy,
}
