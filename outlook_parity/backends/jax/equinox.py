"""Equinox modules."""

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from outlook_parity.backends.jax.base import JaxModel, Values
from outlook_parity.backends.jax.functions import as_jax_arrays, modes_of, split_leaves, with_leaves
from outlook_parity.backends.jax.hooks import watched_classes
from outlook_parity.core.calls import Arguments, argument_names, called


def is_equinox(model: Any) -> bool:
    """Whether this is a module of Equinox, which is not imported for it."""
    kind = getattr(sys.modules.get("equinox"), "Module", None)
    return kind is not None and isinstance(model, kind)


class EquinoxModel(JaxModel):
    """An `equinox.Module`, called as it is, or by a function, as under `jax.vmap` for a batch.

    Its floating-point arrays are the parameters, in PyTorch's layout; biases of convolutions have one axis.

    Args:
        module: the module.
        function: called as `function(module, *inputs)`, None to call the module itself.
    """

    def __init__(
        self, module: Any, function: Callable[..., Any] | None = None, mode: Mapping[str, bool] | None = None
    ) -> None:
        self.module, self.function, self._mode = module, function, mode or {}
        parameters, self.buffers = split_leaves(module)
        self._shapes = {name: value.shape for name, value in parameters.items()}
        self.parameters = {name: _squeezed(name, value) for name, value in parameters.items()}
        self.statistics = ()

    def prepared(self, dtype: np.dtype, *, training: bool, one_by_one: bool) -> "EquinoxModel":
        """See `JaxModel`."""
        import equinox  # type: ignore[import-not-found]

        module = equinox.nn.inference_mode(self.module, value=not training)
        return EquinoxModel(module, self.function, modes_of(self.argument_names, training=training))

    def call(self, parameters: Values, buffers: Values, inputs: Arguments, **watching: Any) -> tuple[Any, Values]:
        """See `JaxModel`."""
        shaped = {name: value.reshape(self._shapes[name]) for name, value in parameters.items()}
        module = with_leaves(self.module, shaped | buffers)
        options: dict[str, Any] = dict(self._mode)
        if "key" in (self.argument_names or ()):
            options["key"] = jax.random.PRNGKey(0)
        watching.pop("draws", None)
        parts = dict(_modules(module, ""))
        paths = {id(part): path for path, part in reversed(parts.items())}
        with watched_classes(paths, {type(part) for part in parts.values()}, **watching):
            if self.function is not None:
                return called(self.function, inputs, module, **options), buffers
            return called(module, inputs, **options), buffers

    def modules(self) -> dict[str, Any]:
        """See `JaxModel`."""
        return dict(_modules(self.module, ""))

    @property
    def has_modules(self) -> bool:
        """See `JaxModel`: under a transformation calls of modules cannot be seen."""
        return self.function is None

    @property
    def argument_names(self) -> frozenset[str] | None:
        """See `JaxModel`."""
        return argument_names(type(self.module).__call__ if self.function is None else self.function)

    def axes(self) -> dict[str, tuple[int, ...]]:
        """See `JaxModel`: as in PyTorch."""
        return {name: tuple(range(value.ndim)) for name, value in self.parameters.items() if name.endswith("weight")}

    def with_weights(self, weights: Mapping[str, np.ndarray]) -> Any:
        """See `JaxModel`."""
        new = {name: value.reshape(self._shapes[name]) for name, value in as_jax_arrays(weights).items()}
        module = with_leaves(self.module, new)
        return module if self.function is None else (self.function, module)


def _squeezed(name: str, value: Any) -> Any:
    """Return the bias of a convolution, of shape (channels, 1, 1), with one axis; anything else as it is."""
    is_bias = name.rpartition(".")[2] == "bias" and value.ndim > 1 and value.size == value.shape[0]
    return jnp.reshape(value, -1) if is_bias else value


def _modules(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Return all modules by path; fields, list items and dictionary keys joined by "."."""
    if is_equinox(tree):
        yield path, tree
        items = list(vars(tree).items())
    elif isinstance(tree, list | tuple):
        items = [(str(index), item) for index, item in enumerate(tree)]
    elif isinstance(tree, dict):
        items = [(str(key), item) for key, item in tree.items()]
    else:
        return
    for name, item in items:
        yield from _modules(item, f"{path}.{name}" if path else name)
