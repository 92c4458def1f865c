"""JAX models of every kind as pure functions of parameters, buffers and inputs."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from outlook_parity.core.calls import Arguments
from outlook_parity.core.dropout import Draws

Values = dict[str, Any]


def placed_like(array: np.ndarray, given: Any) -> jax.Array:
    """Return an array of NumPy as JAX's, on the devices that `given` is committed to, if to any."""
    committed = isinstance(given, jax.Array) and given.committed
    # Not jnp.asarray, which compiles a copy for each shape.
    return jax.device_put(array, given.sharding if committed else None)


class JaxModel(ABC):
    """A model as a pure function.

    Attributes:
        parameters: by path, joined by ".".
        buffers: all other state, by path.
        statistics: the paths of the buffers that are weights.
        rates: the paths of dropout rates, which keep their dtype in every precision.
        constants: the paths of the buffers that are arrays and no variables: nothing writes to them.
    """

    parameters: Values
    buffers: Values
    statistics: tuple[str, ...]
    rates: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()

    @abstractmethod
    def prepared(self, dtype: np.dtype, *, training: bool, one_by_one: bool) -> "JaxModel":
        """Return a copy that computes in `dtype`, in training or eval mode; `one_by_one` without scans and remat."""

    @abstractmethod
    def call(self, parameters: Values, buffers: Values, inputs: Arguments, **watching: Any) -> tuple[Any, Values]:
        """Return the output, and the buffers afterwards.

        With `recorder` and `module_name`, each call of a module is recorded under `module_name(path)`, and replaced by
        what the recorder replays. With `draws`, those decide what is dropped. With `around`, each call of a module runs
        in the context `around(module_name(path), module)`.
        """

    def modules(self) -> dict[str, Any]:
        """Return all modules by path; none where they are made only while the model runs."""
        return {}

    def merged(self, parameters: Values, buffers: Values) -> dict[str, Any]:
        """Return all modules by path, callable, with these weights; none where they cannot be had."""
        return {}

    @property
    def has_modules(self) -> bool:
        """Whether there are modules to compare, as they are or made while the model runs."""
        return True

    @property
    def argument_names(self) -> frozenset[str] | None:
        """The names of the arguments that can be given by keyword; None if they are unknown."""
        return None

    def axes(self) -> dict[str, tuple[int, ...]]:
        """Return the order of PyTorch's axes of the weights whose names do not say it, by path."""
        return {}

    @property
    def mode(self) -> str | None:
        """The mode of the model as given, "training" or "eval"; None if unknown."""
        return None

    @property
    def drops(self) -> bool:
        """Whether a module may drop anything in training."""
        return True

    @abstractmethod
    def with_weights(self, weights: Mapping[str, np.ndarray]) -> Any:
        """Return the user's model with these parameters and statistics; an NNX module is changed."""

    def model_for_loss(self, parameters: Values, buffers: Values, draws: Draws) -> Any:
        """Return a model for a loss to call; then `after()` returns the buffers."""
        return ForLoss(self, parameters, buffers, draws)


class ForLoss:
    """A model for a loss to call; `draws` decide what is dropped."""

    def __init__(self, model: JaxModel, parameters: Values, buffers: Values, draws: Draws) -> None:
        self._model, self._parameters, self._buffers, self._draws = model, parameters, buffers, draws

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Return the output, and keep the buffers."""
        arguments = named or inputs
        output, self._buffers = self._model.call(self._parameters, self._buffers, arguments, draws=self._draws)
        return output

    def after(self) -> Values:
        """Return the buffers after the last call."""
        return self._buffers
