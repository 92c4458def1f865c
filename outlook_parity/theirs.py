"""Anybody's twins for the command line: factories by name, and inputs from a file."""

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np

READERS = {".safetensors": "safetensors.numpy", ".npz": "numpy", ".npy": "numpy"}


def build(name: str, option: str) -> Any:
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
    return factory()


def read_inputs(path: Path) -> np.ndarray:
    """Return the one array of a .safetensors, .npz or .npy file.

    Raises:
        ValueError: the suffix is another one, or the file has not exactly one array.
        OSError: it cannot be read.
    """
    if path.suffix not in READERS:
        raise ValueError(f"{path}: the inputs must be one of {', '.join(READERS)}, got {path.suffix or 'no suffix'}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            arrays = load(path.read_bytes())
        except SafetensorError as error:
            raise ValueError(f"{path}: {error}") from error
    else:
        loaded = np.load(path, allow_pickle=False)
        arrays = {"input": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    if len(arrays) != 1:
        raise ValueError(f"{path}: the inputs must be one array, the file has {len(arrays)}: {', '.join(arrays)}")
    return next(iter(arrays.values()))
