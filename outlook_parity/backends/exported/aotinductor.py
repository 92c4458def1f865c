"""Packages of AOTInductor, run on the CPU: shared libraries, which loading executes."""

import json
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from outlook_common.arrays import to_tensor
from outlook_common.text import listed
from outlook_parity.backends.exported.base import Exported, Port
from outlook_parity.backends.torch.model import to_array
from outlook_parity.core.outputs import output_leaves

# Where a .pt2 archive has what is compiled, each model below its name; `aoti_compile_and_package` calls one "model".
_COMPILED = re.compile(r"[^/]+/data/aotinductor/([^/]+)/(.+)")
_MODEL = "model"
# A compiled model says what its inputs are only in the checks of its source, as messages.
_CHECK = re.compile(r"static void check_input_\d+\(")
_DTYPE = re.compile(r"aoti_torch_dtype_(\w+)\(\)")
_SIZE = re.compile(r'unmatched dim value at (\d+), "\s*<< "expected: (\d+)')
_AXIS = re.compile(r"(?:unmatched (?:dim|stride) value|dim value is too (?:small|large)) at (\d+)")
# Without it a compiled model takes arrays of other shapes, and reads beyond their ends.
_CHECK_INPUTS = "AOTI_RUNTIME_CHECK_INPUTS"


def is_package(path: Path) -> bool:
    """Whether a file is an archive with a compiled model in it, whatever else it has."""
    return zipfile.is_zipfile(path) and bool(_members(path))


class CompiledPackage(Exported):
    """A model compiled by `torch._inductor.aoti_compile_and_package`.

    Raises:
        ValueError: it is compiled for another device or machine, or does not say what its inputs are.
    """

    def __init__(self, path: Path) -> None:
        self.label = f"{path.name} (AOTInductor)"
        self.inputs = _inputs(path)
        try:
            self._model = torch._inductor.aoti_load_package(str(path))
        except Exception as error:  # of many kinds
            raise ValueError(f"{path}: AOTInductor cannot load it: {str(error).partition(chr(10))[0]}") from error
        self._arguments = pytree.treespec_loads(self._model.loader.get_call_spec()[0])

    def call(self, arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """See `Exported`."""
        args, kwargs = pytree.tree_unflatten([to_tensor(array) for array in arrays], self._arguments)
        with torch.no_grad(), _checked_inputs():
            leaves = output_leaves(self._model(*args, **kwargs))
        return {name: to_array(torch.as_tensor(leaf)) for name, leaf in leaves.items()}


def _members(path: Path) -> dict[str, str]:
    """Return the members of the compiled models: path below "data/aotinductor" -> name in the archive."""
    with zipfile.ZipFile(path) as archive:
        matches = [match for name in archive.namelist() if (match := _COMPILED.fullmatch(name))]
    return {f"{match[1]}/{match[2]}": match[0] for match in matches}


def _inputs(path: Path) -> tuple[Port, ...]:
    members = _members(path)
    if (names := sorted({name.partition("/")[0] for name in members})) != [_MODEL]:
        raise ValueError(f"{path}: it has the compiled models {listed(names)}; one, called {_MODEL!r}, can be run")
    with zipfile.ZipFile(path) as archive:
        described: dict[str, Any] = {}
        source = ""
        for name, member in members.items():
            if name.endswith("wrapper_metadata.json"):
                described = json.loads(archive.read(member))
            elif name.endswith("wrapper.cpp"):
                source = archive.read(member).decode()
    if (device := described.get("AOTI_DEVICE_KEY", "cpu")) != "cpu":
        raise ValueError(f"{path}: compiled for {device}; exported programs run on the CPU")
    ports = tuple(_port(index, check) for index, check in enumerate(_CHECK.split(source)[1:]))
    if not ports or None in ports:
        raise ValueError(f"{path}: the source in it does not say what its inputs are, as that of PyTorch 2.13 does")
    return tuple(port for port in ports if port is not None)


def _port(index: int, check: str) -> Port | None:
    """Return the input that the source of a check is for; None if it does not say its dtype."""
    if (dtype := _DTYPE.search(check)) is None:
        return None
    sizes = {int(axis): int(size) for axis, size in _SIZE.findall(check)}
    axes = [int(axis) for axis in _AXIS.findall(check)]
    shape = tuple(sizes.get(axis) for axis in range(max(axes, default=-1) + 1))
    return Port(f"argument {index}", np.dtype(dtype[1]), shape)


@contextmanager
def _checked_inputs() -> Iterator[None]:
    """Let compiled models check their inputs; they read the variable in their first call."""
    before = os.environ.get(_CHECK_INPUTS)
    os.environ[_CHECK_INPUTS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_CHECK_INPUTS]
        else:
            os.environ[_CHECK_INPUTS] = before
