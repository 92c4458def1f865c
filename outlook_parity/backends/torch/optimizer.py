"""Training steps of PyTorch's optimizers, whose state waits in a file between the steps."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from outlook_common.arrays import to_tensor
from outlook_parity.backends.torch.model import to_array
from outlook_parity.core.optimizers import MOST_NUMBERS
from outlook_parity.core.stored import Kept, Shelf

Make = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]


class Stepper:
    """An optimizer of a part of a parameter at a time: only its state is in memory.

    Args:
        make: makes the optimizer, which updates each number by its own gradient.
        model: whose parameters are trained.
    """

    def __init__(self, make: Make, model: torch.nn.Module) -> None:
        self._make, self._model = make, model
        self._shelf = Shelf()
        self._state: dict[str, list[dict[str, Any]]] = {}  # by parameter, of each part by slot

    def step(self) -> None:
        """Update the parameters, and free their gradients."""
        for name, parameter in self._model.named_parameters():
            parts = _parts(parameter)
            before = self._state.get(name, [{}] * len(parts))
            self._state[name] = [self._stepped(*part, state) for part, state in zip(parts, before, strict=True)]
            parameter.grad = None

    def _stepped(self, numbers: torch.Tensor, gradient: torch.Tensor, before: Mapping[str, Any]) -> dict[str, Any]:
        """Update a part of a parameter; return the state afterwards."""
        part = torch.nn.Parameter(numbers)
        part.grad = gradient
        optimizer = self._make([part])
        optimizer.state[part].update({slot: self._read(kept, part.device) for slot, kept in before.items()})
        optimizer.step()
        return {slot: self._keep(value) for slot, value in optimizer.state[part].items()}

    def slots(self, names: Mapping[str, str]) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the state as "momentum of head.weight"; `names` are the words for the slots."""
        shapes = {name: tuple(parameter.shape) for name, parameter in self._model.named_parameters()}
        for slot, kind in names.items():
            for name, parts in self._state.items():
                if all(slot in state for state in parts):
                    numbers = np.concatenate([self._shelf.read(state[slot]).ravel() for state in parts])
                    yield f"{kind} of {name}", numbers.reshape(shapes[name])

    def _keep(self, value: Any) -> Any:
        return self._shelf.keep(to_array(value)) if isinstance(value, torch.Tensor) else value

    def _read(self, kept: Any, device: torch.device) -> Any:
        return to_tensor(self._shelf.read(kept)).to(device) if isinstance(kept, Kept) else kept


def _parts(parameter: torch.nn.Parameter) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the numbers of a parameter in parts that share its memory, with their gradients."""
    numbers, gradient = parameter.detach(), parameter.grad
    assert gradient is not None
    if not numbers.is_contiguous() or numbers.numel() <= MOST_NUMBERS:
        return [(numbers, gradient)]
    flat = (numbers.view(-1), gradient.reshape(-1))
    parts = (tensor.split(MOST_NUMBERS) for tensor in flat)  # type: ignore[no-untyped-call]
    return list(zip(*parts, strict=True))
