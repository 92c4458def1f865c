"""What a JAX model is to the verifier, whatever it is made with: a pure function of parameters, buffers and inputs."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from outlook_parity.core.dropout import Draws

Values = dict[str, Any]


class JaxModel(ABC):
    """A model as a pure function.

    Attributes:
        parameters: by path, joined by ".".
        buffers: everything else that it is a function of; what of it are weights is in `statistics`.
        statistics: the paths of the buffers that are weights.
        rates: those of rates at which things are dropped, which keep their dtype whatever is computed in.
    """

    parameters: Values
    buffers: Values
    statistics: tuple[str, ...]
    rates: tuple[str, ...] = ()

    @abstractmethod
    def prepared(self, dtype: np.dtype, *, training: bool, one_by_one: bool) -> "JaxModel":
        """Return a copy that computes in `dtype`, trains or not, and if asked calls its modules one by one."""

    @abstractmethod
    def call(self, parameters: Values, buffers: Values, inputs: Sequence[Any], **watching: Any) -> tuple[Any, Values]:
        """Return what it gives, and its buffers afterwards.

        With `recorder` and `module_name`, each call of a module is recorded under the name that the function gives for
        its path, and replaced by what the recorder plays. With `draws`, those decide what is dropped.
        """

    def modules(self) -> dict[str, Any]:
        """Return all modules by path; none where they are made only while the model runs."""
        return {}

    def merged(self, parameters: Values, buffers: Values) -> dict[str, Any]:
        """Return all modules by path, with these weights, to be called; none where they cannot be."""
        return {}

    @property
    def mode(self) -> str | None:
        """Whether the model as given trains: "training" or "eval"; None if it does not say."""
        return None

    @property
    def drops(self) -> bool:
        """Whether a module drops anything in training, as far as can be seen before it runs."""
        return True

    @property
    def own_dropout(self) -> str | None:
        """The path of a module that drops at random without asking a dropout module, None if none is known."""
        return None

    @abstractmethod
    def with_weights(self, weights: Mapping[str, np.ndarray]) -> Any:
        """Return what the model was made of with these parameters and statistics; an NNX module is changed."""

    def model_for_loss(self, parameters: Values, buffers: Values, draws: Draws) -> Any:
        """Return what a loss can call, and once it has, `after()` gives the buffers."""
        return ForLoss(self, parameters, buffers, draws)


class ForLoss:
    """A model that a loss can call, dropping what `draws` decide."""

    def __init__(self, model: JaxModel, parameters: Values, buffers: Values, draws: Draws) -> None:
        self._model, self._parameters, self._buffers, self._draws = model, parameters, buffers, draws

    def __call__(self, *inputs: Any) -> Any:
        """Return what the model gives, and keep its buffers."""
        output, self._buffers = self._model.call(self._parameters, self._buffers, inputs, draws=self._draws)
        return output

    def after(self) -> Values:
        """Return the buffers after the last call."""
        return self._buffers
