"""A model of either framework, as the verifier sees it. Imports no framework."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from outlook_parity.compare import Tensors
from outlook_parity.masks import Draw
from outlook_parity.request import Request
from outlook_parity.semantics import Facts
from outlook_parity.tape import Tape


@dataclass(frozen=True)
class Run:
    """What one twin computed in eval mode; values in float64, `output_dtype` as the model gave them.

    `gradients` are those of sum(output * cotangent), for "input" and every parameter; empty if not asked for.
    """

    output: np.ndarray
    output_dtype: str
    gradients: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Training:
    """What training steps gave: tensors by "optimizer: name", losses and state included, and the last masks drawn."""

    tensors: Tensors
    draws: Sequence[Draw] = ()


class Twin(ABC):
    """A model of either framework."""

    name: str  # "torch" or "jax"

    @abstractmethod
    def weights(self) -> dict[str, np.ndarray]:
        """Return every parameter and buffer in float64 under its torch name."""

    @abstractmethod
    def run(self, request: Request, *, gradients: bool = True) -> Run:
        """Return output and gradients, in eval mode, as a user would compute them: jitted in JAX."""

    @abstractmethod
    def watch(self, request: Request, tape: Tape | None) -> np.ndarray:
        """Return the output in float64, computed module by module (in JAX: not jitted), in eval mode.

        Every call of a module is written to the tape, and replaced by what the tape plays; arrays in the dtype and
        layout that they have there.
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
