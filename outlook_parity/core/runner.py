"""A model of either framework, as the verifier sees it. Imports no framework."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from outlook_common.arrays import is_floating
from outlook_parity.compare.tensors import Tensors
from outlook_parity.core.attributes import Facts
from outlook_parity.core.check import REVERSED, TWICE
from outlook_parity.core.dropout import Draw
from outlook_parity.core.recorder import Recorder
from outlook_parity.core.request import Inputs, Request, batch_of, batch_reversed, scattered


@dataclass(frozen=True)
class Run:
    """What one twin computed in eval mode.

    Attributes:
        outputs: in float64 by name: "output", or of several "output.0", "output.logits"…
        dtypes: of the outputs, as the model gave them.
        gradients: those of the sum over the outputs of output * cotangent, for every input and parameter; empty if not
            asked for.
        again: what the same copy of the model gave when it was called again: by how, see `asked_again`, the outputs, or
            why there are none.
    """

    outputs: Tensors
    dtypes: Mapping[str, str]
    gradients: Tensors = field(default_factory=dict)
    again: Mapping[str, Tensors | str] = field(default_factory=dict)


# How a model is called again, besides `TWICE` and `REVERSED`.
SCATTERED = "other numbers"


def asked_again(request: Request) -> dict[str, Inputs]:
    """Return what a model is called with once more, by how."""
    asked = {TWICE: request.inputs}
    if (batch := batch_of(request.inputs)) > 1:
        asked[REVERSED] = batch_reversed(request.inputs, batch)
    if request.dtype == "float64" and any(map(is_floating, request.inputs.values())):
        asked[SCATTERED] = scattered(request.inputs, request.seed)
    return asked


def called_again(request: Request, call: Callable[[Inputs], Tensors]) -> dict[str, Tensors | str]:
    """Return what a model gives when it is called again, by how."""
    found: dict[str, Tensors | str] = {}
    for how, inputs in asked_again(request).items():
        try:
            found[how] = call(inputs)
        except (ValueError, RuntimeError, TypeError, IndexError, ArithmeticError) as error:
            if how != SCATTERED:  # numbers of ours, which a model may refuse
                raise
            found[how] = str(error).partition("\n")[0]
        if how == REVERSED and not isinstance(found[how], str):
            found[how] = batch_reversed(found[how], batch_of(request.inputs))  # type: ignore[arg-type]
    return found


@dataclass(frozen=True)
class Training:
    """What training steps gave: tensors by "optimizer: name", losses and state included, and the last masks drawn."""

    tensors: Tensors
    draws: Sequence[Draw] = ()


class Runner(ABC):
    """A model of either framework."""

    name: str  # "torch" or "jax"

    @abstractmethod
    def weights(self) -> dict[str, np.ndarray]:
        """Return every parameter and buffer in float64 under its torch name."""

    @abstractmethod
    def run(self, request: Request, *, gradients: bool = True, again: bool = False) -> Run:
        """Return outputs and gradients, in eval mode, as a user would compute them: jitted in JAX.

        If asked, the same copy of the model is called once more in each of the ways of `asked_again`.
        """

    @abstractmethod
    def watch(self, request: Request, recorder: Recorder | None) -> Tensors:
        """Return the outputs in float64, computed module by module (in JAX: not jitted), in eval mode.

        Every call of a module is recorded, and replaced by what the recorder plays; arrays in the dtype and layout that
        they have there.
        """

    @abstractmethod
    def describe(self, request: Request) -> Facts:
        """Return what the modules say about themselves, under torch paths."""

    @abstractmethod
    def train(self, request: Request) -> Training:
        """Return the losses of the steps, and the parameters, buffers and the optimizer's state after the last.

        Each optimizer starts from the same weights. In training mode; what is dropped is decided by masks that both
        twins share.
        """


def prefixed(optimizer: str, tensors: Tensors) -> dict[str, np.ndarray]:
    """Return tensors of training steps as they are called in the report."""
    return {f"{optimizer}: {name}": array for name, array in tensors.items()}
