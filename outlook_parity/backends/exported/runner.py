"""The runner of an exported program."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from outlook_parity.backends.exported.base import Exported
from outlook_parity.core.attributes import Attributes
from outlook_parity.core.check import Tensors
from outlook_parity.core.errors import user_code_errors
from outlook_parity.core.layout import Axes
from outlook_parity.core.outputs import OutputMatch
from outlook_parity.core.program import Program
from outlook_parity.core.recorder import Recorder
from outlook_parity.core.request import Inputs, Request
from outlook_parity.core.runner import Run, Runner, Training, repeat_calls
from outlook_parity.core.stored import Computed, Stored
from outlook_parity.core.truth import Truth


class ExportedRunner(Runner):
    """An exported program in place of one twin.

    Args:
        twin: "torch" or "jax".
        program: the program.
        axes: input -> the order in which it takes the axes; inputs are as JAX has them.
        out_axes: output -> the order in which JAX has its axes, where it is another one.
        outputs: which of its outputs are which of PyTorch's; None if the names are the same.
    """

    def __init__(
        self,
        twin: str,
        program: Exported,
        axes: Mapping[str, Axes],
        out_axes: Mapping[str, Axes] | None = None,
        outputs: OutputMatch | None = None,
    ) -> None:
        self.name = twin
        self.exported = program
        self.truth = Truth()
        self._axes, self._out_axes, self._outputs = axes, out_axes or {}, outputs or OutputMatch()

    def shapes(self, request: Request) -> dict[str, tuple[int, ...]]:
        """See `Runner`."""
        return {name: tuple(array.shape[i] for i in self._axes[name]) for name, array in request.inputs.items()}

    @property
    def frozen(self) -> frozenset[str]:
        """The parameters that are not trained; it has none."""
        return frozenset()

    def weights(self) -> Computed:
        """See `Runner`; none that could be compared."""
        return Computed({})

    def kinds(self) -> dict[str, str]:
        """See `Runner`."""
        return {}

    def run(self, request: Request, *, gradients: bool = True, repeat: bool = False) -> Run:
        """See `Runner`; without gradients."""
        outputs = self._call(request, request.inputs)

        def call(inputs: Inputs) -> Tensors:
            return _all_float64(self._call(request, inputs))

        return Run(
            outputs=Stored(request.masked(_all_float64(outputs)).items()),
            dtypes={name: array.dtype.name for name, array in outputs.items()},
            repeated=repeat_calls(request, call) if repeat else {},
        )

    def _call(self, request: Request, inputs: Inputs) -> dict[str, np.ndarray]:
        """Return the outputs under PyTorch's names, their axes as JAX has them."""
        self.exported.check_inputs(inputs, self._axes)
        rounded = request.rounded_inputs(inputs)
        arrays = [
            np.ascontiguousarray(rounded[name].transpose(self._axes[name])).astype(port.dtype, copy=False)
            for name, port in zip(inputs, self.exported.inputs, strict=True)
        ]
        with user_code_errors(self.exported.label, self.shapes(request)):
            found = self._outputs.of_jax(self.exported.call(arrays))
        return {
            name: array.transpose(self._out_axes[name]) if name in self._out_axes else array
            for name, array in found.items()
        }

    def attributes(self, request: Request) -> Attributes:
        """See `Runner`; none are known."""
        return {}

    def program(self, request: Request, keep: Callable[[str], bool]) -> Program:
        """See `Runner`; its operations are not read."""
        return Program()

    def watch(self, request: Request, recorder: Recorder | None) -> Tensors:
        """See `Runner`; there are no modules."""
        return dict(self.run(request, gradients=False).outputs)

    def module(self, request: Request, path: str) -> AbstractContextManager[Any]:
        """See `Runner`; there are none."""
        return nullcontext()

    def train(self, request: Request) -> Training:
        """Not to be had of a program; see `Pair.refused`."""
        raise NotImplementedError(f"{self.exported.label} cannot be trained")


def _all_float64(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.asarray(array, np.float64) for name, array in arrays.items()}
