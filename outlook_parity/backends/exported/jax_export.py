"""Programs of `jax.export`, in memory or serialized in a file, run on the CPU."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.export  # no attribute of jax before it is imported
import numpy as np

from outlook_common.extras import require
from outlook_parity.backends.exported.base import Exported, Port, open_sizes
from outlook_parity.backends.jax.settings import jax_device, pinned
from outlook_parity.core.outputs import output_leaves


class JaxProgram(Exported):
    """An exported program of JAX.

    Raises:
        ImportError: flatbuffers is not installed, which reading a file takes.
        ValueError: the file is none.
    """

    def __init__(self, source: Path | jax.export.Exported) -> None:
        self.label = f"{source.name} (jax.export)" if isinstance(source, Path) else "the jax.export program"
        self._program = _loaded(source) if isinstance(source, Path) else source
        self.inputs = tuple(
            Port(f"argument {index}", np.dtype(aval.dtype), open_sizes(aval.shape))
            for index, aval in enumerate(self._program.in_avals)
        )

    def call(self, arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """See `Exported`."""
        args, kwargs = jax.tree_util.tree_unflatten(self._program.in_tree, list(arrays))
        with pinned(self.dtype, jax_device("cpu")):
            leaves = output_leaves(self._program.call(*args, **kwargs))  # type: ignore[no-untyped-call]
        return {name: np.asarray(leaf) for name, leaf in leaves.items()}


def _loaded(path: Path) -> jax.export.Exported:
    require("flatbuffers", needed_by=f"outlook_parity, to read {path.name},")
    try:
        return jax.export.deserialize(bytearray(path.read_bytes()))
    except OSError:
        raise
    except Exception as error:  # of many kinds: a flatbuffer has no mark
        raise ValueError(f"{path}: jax.export cannot read it: {str(error).partition(chr(10))[0]}") from error
