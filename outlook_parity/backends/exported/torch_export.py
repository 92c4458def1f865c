"""Programs of `torch.export`, in memory or in a .pt2 file, run on the CPU."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils import _pytree as pytree

from outlook_common.arrays import to_tensor
from outlook_parity.backends.exported.base import Exported, Port, open_sizes
from outlook_parity.backends.torch.model import dtype_of, to_array
from outlook_parity.core.outputs import output_leaves


class TorchProgram(Exported):
    """An exported program of PyTorch.

    Raises:
        ValueError: the file is none, or an input is no tensor.
    """

    def __init__(self, source: Path | torch.export.ExportedProgram) -> None:
        self.label = f"{source.name} (torch.export)" if isinstance(source, Path) else "the torch.export program"
        program = _loaded(source) if isinstance(source, Path) else source
        self.inputs = tuple(self._port(node) for node in _user_inputs(program))
        self._module = program.module()
        self._arguments = program.call_spec.in_spec

    def call(self, arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """See `Exported`."""
        args, kwargs = pytree.tree_unflatten([to_tensor(array) for array in arrays], self._arguments)
        with torch.no_grad():
            leaves = output_leaves(self._module(*args, **kwargs))
        return {name: to_array(torch.as_tensor(leaf)) for name, leaf in leaves.items()}

    def _port(self, node: torch.fx.Node) -> Port:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{self.label}: input {node.name} is {value!r}, and only tensors can be given")
        return Port(node.name, np.dtype(dtype_of(value)), open_sizes(value.shape))


def _loaded(path: Path) -> torch.export.ExportedProgram:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: no program of torch.export.save, which is a ZIP archive")
    try:
        return torch.export.load(path)
    except Exception as error:  # of many kinds
        raise ValueError(f"{path}: torch.export cannot load it: {str(error).partition(chr(10))[0]}") from error


def _user_inputs(program: torch.export.ExportedProgram) -> list[torch.fx.Node]:
    names = program.graph_signature.user_inputs
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    return [nodes[str(name)] for name in names if str(name) in nodes]
