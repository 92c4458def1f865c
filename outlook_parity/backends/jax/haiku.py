"""Haiku's transformed functions with their parameters, and state if they have any."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from outlook_parity.backends.jax.base import JaxModel, Values
from outlook_parity.backends.jax.functions import as_jax_arrays
from outlook_parity.backends.jax.hooks import observed
from outlook_parity.core.calls import Arguments, called

# Haiku's names of leaves -> Flax's, whose layouts are the same.
LEAVES = {"w": "kernel", "b": "bias", "offset": "bias", "embeddings": "embedding"}


def is_haiku(function: Any) -> bool:
    """Whether this is a transformed function of Haiku, or the `apply` of one."""
    home = getattr(function, "__module__", None) or type(function).__module__
    return str(home).startswith("haiku._src.transform") or type(function).__module__.startswith("haiku._src.transform")


class HaikuModel(JaxModel):
    """What `haiku.transform` returns, or its `apply`, with parameters and perhaps state."""

    def __init__(self, function: Any, parameters: Mapping[str, Any], state: Mapping[str, Any] | None = None) -> None:
        self.function = function
        self._apply: Callable[..., Any] = getattr(function, "apply", function)
        self._given = (parameters, state)
        self.parameters, self._homes = _flat(parameters)
        self.buffers, self._state_homes = _flat(state or {})
        self.statistics = ()
        self._before = [name for name in inspect.signature(self._apply).parameters if name in ("state", "rng")]

    def prepared(self, dtype: np.dtype, *, training: bool, one_by_one: bool) -> "HaikuModel":
        """See `JaxModel`: the mode is in the function's own arguments, and stays as it is."""
        return HaikuModel(self.function, *self._given)

    def call(self, parameters: Values, buffers: Values, inputs: Arguments, **watching: Any) -> tuple[Any, Values]:
        """See `JaxModel`."""
        import haiku  # type: ignore[import-not-found]

        first: list[Any] = [_nested(parameters, self._homes)]
        with_state = self._given[1] is not None
        first += [_nested(buffers, self._state_homes)] if with_state else []
        first += [jax.random.PRNGKey(0)] if "rng" in self._before else []
        module_name = watching.pop("module_name", str)
        watching.pop("draws", None)

        def intercept(method: Any, args: Any, kwargs: Any, context: Any) -> Any:
            if context.method_name != "__call__" or not watching:
                return method(*args, **kwargs)
            name = module_name(_dotted(context.module.module_name))
            return observed(method, args, kwargs, name=name, module=context.module, **watching)

        with haiku.intercept_methods(intercept):
            result = called(self._apply, inputs, *first)
        output, after = result if with_state else (result, {})
        return output, {**buffers, **_flat(after)[0]}

    def with_weights(self, weights: Mapping[str, np.ndarray]) -> Any:
        """See `JaxModel`."""
        parameters = _nested({**self.parameters, **as_jax_arrays(weights, self.parameters)}, self._homes)
        return (self.function, parameters) if self._given[1] is None else (self.function, parameters, self._given[1])


def _dotted(module: str) -> str:
    return ".".join(step for step in module.split("/") if step != "~")


def _flat(tree: Mapping[str, Any]) -> tuple[Values, dict[str, tuple[str, str]]]:
    """Return the leaves by path, and where they are."""
    values: Values = {}
    homes = {}
    for module, leaves in tree.items():
        for leaf, value in leaves.items():
            name = f"{_dotted(module)}.{LEAVES.get(leaf, leaf)}"
            values[name], homes[name] = value, (module, leaf)
    return values, homes


def _nested(values: Values, homes: Mapping[str, tuple[str, str]]) -> dict[str, dict[str, Any]]:
    tree: dict[str, dict[str, Any]] = {}
    for name, (module, leaf) in homes.items():
        tree.setdefault(module, {})[leaf] = values[name]
    return tree
