"""A runner: runs a model of either framework under control. Imports no framework."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeVar

import numpy as np

from outlook_common.arrays import is_floating
from outlook_parity.core.attributes import Attributes
from outlook_parity.core.check import REVERSED, TWICE, Tensors
from outlook_parity.core.dropout import Draw
from outlook_parity.core.errors import user_code_errors
from outlook_parity.core.program import Program
from outlook_parity.core.recorder import Recorder
from outlook_parity.core.request import Inputs, Request, batch_of, batch_reversed, scattered
from outlook_parity.core.sizes import SIZES, resized
from outlook_parity.core.stored import Computed, Stored
from outlook_parity.core.truth import Truth


@dataclass(frozen=True)
class Run:
    """What one twin computed in eval mode.

    Attributes:
        outputs: in float64 by name: "output", or of several "output.0", "output.logits"…
        dtypes: of the outputs, as the model gave them.
        gradients: of the sum over the outputs of output * cotangent, for every input and parameter; empty if not
            requested.
        repeated: what the same copy of the model gave when it was called again: by how, see `repeat_inputs`, the
            outputs, or why there are none.
        unused: parameters that no output depends on, where the framework can tell.
    """

    outputs: Tensors
    dtypes: Mapping[str, str]
    gradients: Tensors = field(default_factory=dict)
    repeated: Mapping[str, Tensors | str] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()


# How a model is called again, besides `TWICE` and `REVERSED`.
SCATTERED = "other numbers"


def repeat_inputs(request: Request) -> dict[str, Inputs]:
    """Return the inputs that a model is called with once more, by how."""
    inputs = {TWICE: request.inputs}
    if (batch := batch_of(request.inputs)) > 1:
        inputs[REVERSED] = batch_reversed(request.inputs, batch)
    if request.dtype == "float64" and any(map(is_floating, request.inputs.values())):
        inputs[SCATTERED] = scattered(request.inputs, request.seed)
    if request.dtype == "float64" and not request.masks and request.positions is None:
        inputs |= resized(request.inputs)
    return inputs


def repeat_calls(request: Request, call: Callable[[Inputs], Tensors]) -> dict[str, Tensors | str]:
    """Return the outputs of a model that is called again, by how; of a refusal its message."""
    results: dict[str, Tensors | str] = {}
    for how, inputs in repeat_inputs(request).items():
        try:
            outputs = call(inputs)
        except Exception as error:
            if how != SCATTERED and how not in SIZES:  # inputs of the verifier's own, which a model may refuse
                raise
            results[how] = str(error).partition("\n")[0]
            continue
        in_order = batch_reversed(outputs, batch_of(request.inputs)) if how == REVERSED else outputs
        results[how] = Stored(request.masked(in_order).items())
    return results


@dataclass(frozen=True)
class Training:
    """Tensors after training steps by "optimizer: name", losses and state included, and the last masks drawn."""

    tensors: Tensors
    draws: Sequence[Draw] = ()


Method = TypeVar("Method", bound=Callable[..., Any])


def guarded(method: Method) -> Method:
    """Let a method of a runner re-raise what goes wrong in a user's model with model, module, shapes and line."""

    @wraps(method)
    def run(self: "Runner", request: Request, *args: Any, **kwargs: Any) -> Any:
        with user_code_errors({"jax": "JAX"}.get(self.name, self.name), self.shapes(request)):
            return method(self, request, *args, **kwargs)

    return run  # type: ignore[return-value]


class Runner(ABC):
    """A model of either framework that can be run; all results are in float64 under torch names."""

    name: str  # "torch" or "jax"
    truth: Truth  # what its runs in float64 showed

    def shapes(self, request: Request) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the inputs as the model takes them, for messages."""
        return {name: array.shape for name, array in request.inputs.items()}

    @abstractmethod
    def weights(self) -> Computed:
        """Return every parameter and buffer; each is converted when it is read."""

    @abstractmethod
    def kinds(self) -> dict[str, str]:
        """Return the types of the modules by path; none where they are made only while the model runs."""

    @abstractmethod
    def run(self, request: Request, *, gradients: bool = True, repeat: bool = False) -> Run:
        """Return outputs and gradients, in eval mode, as a user would compute them: jitted in JAX.

        With `repeat`, the same copy of the model is called once more in each of the ways of `repeat_inputs`.
        """

    @abstractmethod
    def watch(self, request: Request, recorder: Recorder | None) -> Tensors:
        """Return the outputs, computed module by module (in JAX: not jitted), in eval mode.

        Every call of a module is recorded, and replaced by what the recorder replays; arrays in the dtype and layout
        that they have there.
        """

    @abstractmethod
    def attributes(self, request: Request) -> Attributes:
        """Return the attributes of the modules."""

    @abstractmethod
    def program(self, request: Request, keep: Callable[[str], bool]) -> Program:
        """Return the operations of one run in eval mode; with results of modules that `keep` names, or more."""

    @abstractmethod
    def module(self, request: Request, path: str) -> AbstractContextManager[Any]:
        """Return a context in which the module with this path can be called, in eval mode; None if there is none."""

    @abstractmethod
    def train(self, request: Request) -> Training:
        """Return the losses of the steps, and the parameters, buffers and the optimizer's state after the last.

        Each optimizer starts from the same weights. In training mode; what is dropped is decided by masks that both
        twins share.
        """


def prefixed(optimizer: str, tensors: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield tensors of training steps under the names that they have in the report."""
    return ((f"{optimizer}: {name}", array) for name, array in tensors)
