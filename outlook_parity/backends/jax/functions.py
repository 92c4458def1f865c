"""Functions of a pytree of weights and of inputs."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from outlook_parity.backends.jax.base import JaxModel, Values, placed_like
from outlook_parity.backends.jax.linen import MODES
from outlook_parity.core.calls import Arguments, argument_names, called


class FunctionModel(JaxModel):
    """A function of arrays, or of a pytree of parameters and then of arrays.

    Args:
        function: called as `function(*inputs)`, or `function(weights, *inputs)`.
        weights: any pytree, None for a function without weights. Its floating-point arrays are the parameters.
    """

    def __init__(
        self, function: Callable[..., Any], weights: Any = None, mode: Mapping[str, bool] | None = None
    ) -> None:
        self.function, self.weights, self._mode = function, weights, mode or {}
        self.parameters, self.buffers = split_leaves(weights)
        self.statistics = ()

    def prepared(self, dtype: np.dtype, *, training: bool, one_by_one: bool) -> "FunctionModel":
        """See `JaxModel`."""
        return FunctionModel(self.function, self.weights, modes_of(argument_names(self.function), training=training))

    def call(self, parameters: Values, buffers: Values, inputs: Arguments, **watching: Any) -> tuple[Any, Values]:
        """See `JaxModel`."""
        first = () if self.weights is None else (with_leaves(self.weights, parameters | buffers),)
        return called(self.function, inputs, *first, **dict[str, Any](self._mode)), buffers

    @property
    def has_modules(self) -> bool:
        """See `JaxModel`."""
        return False

    @property
    def argument_names(self) -> frozenset[str] | None:
        """See `JaxModel`."""
        return argument_names(self.function)

    def with_weights(self, weights: Mapping[str, np.ndarray]) -> Any:
        """See `JaxModel`."""
        if self.weights is None:
            return self.function
        return self.function, with_leaves(self.weights, as_jax_arrays(weights, self.parameters | self.buffers))


def modes_of(names: frozenset[str] | None, *, training: bool) -> dict[str, bool]:
    """Return the arguments for the mode that a function has, by name."""
    return {name: value == training for name, value in MODES.items() if names is not None and name in names}


def as_jax_arrays(weights: Mapping[str, np.ndarray], given: Mapping[str, Any] | None = None) -> Values:
    """Return NumPy arrays as JAX's, where those in `given` are."""
    return {name: placed_like(array, (given or {}).get(name)) for name, array in weights.items()}


def is_array(leaf: Any) -> bool:
    """Whether a leaf of a pytree is an array."""
    return isinstance(leaf, jax.Array | np.ndarray)


def split_leaves(tree: Any) -> tuple[Values, Values]:
    """Return the floating-point arrays of a pytree, and its other arrays, by path."""
    parameters: Values = {}
    others: Values = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if is_array(leaf):
            floating = jnp.issubdtype(leaf.dtype, jnp.inexact)
            (parameters if floating else others)[path_name(path)] = leaf
    return parameters, others


def with_leaves(tree: Any, values: Values) -> Any:
    """Return a pytree with other arrays by path."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    return jax.tree_util.tree_unflatten(structure, [values.get(path_name(path), leaf) for path, leaf in leaves])


def path_name(path: Any) -> str:
    """Return the path of a leaf in a pytree, joined by "."."""
    return ".".join(_step(key) for key in path)


def _step(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
