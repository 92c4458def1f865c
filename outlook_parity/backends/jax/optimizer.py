"""Training steps of optax's optimizers, whose state waits in a file between the steps."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

from outlook_common.arrays import to_numpy
from outlook_parity.backends.jax.base import Values
from outlook_parity.core.optimizers import MOST_NUMBERS
from outlook_parity.core.stored import Kept, Shelf

# Of a parameter: its name, and the first number and the one after the last.
Piece = tuple[str, int, int]


class Stepper:
    """An optimizer of some numbers at a time, pieces of parameters joined to a vector: only their state is in memory.

    Args:
        optimizer: updates each number by its own gradient.
        parameters: that are trained; they stay sharded as they are.
    """

    def __init__(self, optimizer: optax.GradientTransformation, parameters: Values) -> None:
        self._init, self._update = jax.jit(optimizer.init), jax.jit(partial(_update, optimizer))
        self._shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self._parts = _parts({name: parameter.size for name, parameter in parameters.items()})
        self._shelf = Shelf()
        self._state: list[list[Kept]] = [[] for _ in self._parts]
        self._structure: Any = None

    def step(self, parameters: Values, gradients: Values) -> None:
        """Replace the parameters by those afterwards; `gradients` is emptied."""
        for name, array in self._joined(self._vectors(parameters, gradients)):
            sharding = parameters[name].sharding
            parameters[name] = gradients[name] = None  # freed before there is a third array of this size
            # What lies on one device is committed to none.
            spread = len(sharding.device_set) > 1
            parameters[name] = jax.device_put(array, sharding if spread else None)
        gradients.clear()

    def _vectors(self, parameters: Values, gradients: Values) -> Iterator[np.ndarray]:
        """Yield the numbers of each part after a step."""
        for index, pieces in enumerate(self._parts):
            vector, gradient = (self._vector(values, pieces) for values in (parameters, gradients))
            state = self._read(index) if self._state[index] else self._init(vector)
            vector, state = self._update(gradient, state, vector)
            leaves, self._structure = jax.tree.flatten(state)
            self._state[index] = [self._shelf.keep(to_numpy(leaf)) for leaf in leaves]
            yield to_numpy(vector)

    def slot(self, slot: str) -> Iterator[tuple[str, np.ndarray]]:
        """Yield what the optimizer keeps of each parameter in a slot; nothing if it has no such slot."""
        vectors = (optax.tree_utils.tree_get(self._read(index), slot) for index in range(len(self._parts)))
        yield from self._joined(to_numpy(vector) for vector in vectors if vector is not None)

    def _vector(self, values: Values, pieces: Sequence[Piece]) -> Any:
        arrays = [to_numpy(values[name]).reshape(-1)[start:stop] for name, start, stop in pieces]
        return jax.device_put(np.concatenate(arrays))

    def _joined(self, vectors: Iterable[np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        """Yield parameters of the vectors of the parts, each when it is complete."""
        found: dict[str, np.ndarray] = {}
        for pieces, vector in zip(self._parts, vectors, strict=False):
            begin = 0
            for name, start, stop in pieces:
                whole = found.setdefault(name, np.empty(int(np.prod(self._shapes[name])), vector.dtype))
                whole[start:stop] = vector[begin : begin + stop - start]
                begin += stop - start
                if stop == whole.size:
                    yield name, found.pop(name).reshape(self._shapes[name])

    def _read(self, index: int) -> Any:
        leaves = [jax.device_put(self._shelf.read(kept)) for kept in self._state[index]]
        return jax.tree.unflatten(self._structure, leaves)


def _update(optimizer: optax.GradientTransformation, gradients: Any, state: Any, parameters: Any) -> tuple[Any, Any]:
    updates, state = optimizer.update(gradients, state, parameters)
    return optax.apply_updates(parameters, updates), state


def _parts(sizes: Mapping[str, int]) -> list[list[Piece]]:
    """Return pieces of parameters in parts of `MOST_NUMBERS` numbers; the last has fewer."""
    parts: list[list[Piece]] = []
    room = 0
    for name, size in sizes.items():
        start = 0
        while start < size:
            if not room:
                parts.append([])
                room = MOST_NUMBERS
            stop = min(size, start + room)
            parts[-1].append((name, start, stop))
            room -= stop - start
            start = stop
    return parts
