"""ONNX files, run by ONNX Runtime on the CPU."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from outlook_common.extras import require
from outlook_parity.backends.exported.base import Exported, Port, open_sizes

# ONNX Runtime's words for what NumPy has too.
_DTYPES = {
    "float": np.float32,
    "double": np.float64,
    "float16": np.float16,
    "bool": np.bool_,
    **{f"{sign}int{bits}": getattr(np, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)},
}


class OnnxFile(Exported):
    """An ONNX file.

    Raises:
        ImportError: ONNX Runtime is not installed.
        ValueError: it cannot read the file, or an input is no tensor of numbers.
    """

    def __init__(self, path: Path) -> None:
        require("onnxruntime", needed_by=f"outlook_parity, to run {path.name},")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors: what it removes of a graph is no concern of the reader
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # of many kinds, one per status
            raise ValueError(f"{path}: ONNX Runtime cannot read it: {str(error).partition(chr(10))[0]}") from error
        self.label = f"{path.name} (ONNX Runtime {onnxruntime.__version__})"
        self.inputs = tuple(
            Port(one.name, _dtype(path, one.name, one.type), open_sizes(one.shape))
            for one in self._session.get_inputs()
        )

    def call(self, arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """See `Exported`."""
        named = {port.name: array for port, array in zip(self.inputs, arrays, strict=True)}
        outputs = self._session.run(None, named)
        return {"output": outputs[0]} if len(outputs) == 1 else {f"output.{i}": out for i, out in enumerate(outputs)}


def _dtype(path: Path, name: str, kind: str) -> np.dtype:
    dtype = _DTYPES.get(kind.removeprefix("tensor(").removesuffix(")"))
    if dtype is None:
        raise ValueError(f"{path}: input {name} is {kind}; tensors of {', '.join(_DTYPES)} can be given")
    return np.dtype(dtype)
