"""Linen modules with their variables as pure functions."""

import inspect
from collections.abc import Mapping
from typing import Any

import flax.linen as linen
import jax
import numpy as np
from flax import traverse_util

from outlook_parity.backends.jax.base import JaxModel, Values, placed_like
from outlook_parity.backends.jax.hooks import watched_linen
from outlook_parity.core.calls import Arguments, argument_names, called

# Arguments for the mode -> their value in training.
MODES = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
    "eval_mode": False,
}


class LinenModel(JaxModel):
    """A Linen module with its variables."""

    def __init__(
        self, module: linen.Module, variables: Mapping[str, Any], mode: Mapping[str, bool] | None = None
    ) -> None:
        self.module = module
        self._mode = mode or {}
        unboxed = linen.meta.unbox(dict(variables))
        self.parameters = flat(unboxed.get("params", {}))
        self._collection: dict[str, str] = {}
        self.buffers = {}
        for collection, tree in unboxed.items():
            if collection != "params":
                leaves = flat(tree)
                self.buffers |= leaves
                self._collection |= dict.fromkeys(leaves, collection)
        self.statistics = tuple(name for name, kind in self._collection.items() if kind == "batch_stats")

    def prepared(self, dtype: np.dtype, *, training: bool, one_by_one: bool) -> "LinenModel":
        """See `JaxModel`."""
        accepted = inspect.signature(type(self.module).__call__).parameters
        mode = {name: value == training for name, value in MODES.items() if name in accepted}
        module = self.module
        if getattr(module, "dtype", None) is not None:
            module = module.clone(dtype=dtype)
        return LinenModel(module, self._variables(self.parameters, self.buffers), mode)

    def call(self, parameters: Values, buffers: Values, inputs: Arguments, **watching: Any) -> tuple[Any, Values]:
        """See `JaxModel`."""
        mutable = sorted(set(self._collection.values()))
        rngs = {"dropout": jax.random.key(0)}
        with watched_linen(**watching):
            variables, options = self._variables(parameters, buffers), dict[str, Any](self._mode)
            output, changed = called(self.module.apply, inputs, variables, mutable=mutable, rngs=rngs, **options)
        after: Values = {}
        for tree in changed.values():
            after |= flat(tree)
        return output, buffers | {name: value for name, value in after.items() if name in buffers}

    @property
    def argument_names(self) -> frozenset[str] | None:
        """See `JaxModel`."""
        return argument_names(type(self.module).__call__)

    def with_weights(self, weights: Mapping[str, np.ndarray]) -> Any:
        """See `JaxModel`."""
        given = self.parameters | self.buffers
        new = {name: placed_like(array, given.get(name)) for name, array in weights.items()}
        parameters = {name: new.get(name, value) for name, value in self.parameters.items()}
        buffers = {name: new.get(name, value) for name, value in self.buffers.items()}
        return self.module, self._variables(parameters, buffers)

    def _variables(self, parameters: Values, buffers: Values) -> dict[str, Any]:
        collections: dict[str, Any] = {"params": nested(parameters)}
        for collection in set(self._collection.values()):
            own = {name: value for name, value in buffers.items() if self._collection[name] == collection}
            collections[collection] = nested(own)
        return collections


def flat(tree: Any) -> Values:
    """Return the leaves of nested dictionaries by path, joined by "."."""
    return dict(traverse_util.flatten_dict(tree, sep="."))  # type: ignore[no-untyped-call]


def nested(values: Values) -> Any:
    """Return leaves by path as nested dictionaries."""
    return traverse_util.unflatten_dict(values, sep=".")  # type: ignore[no-untyped-call]
