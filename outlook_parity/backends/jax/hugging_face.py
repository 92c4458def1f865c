"""Flax models of Hugging Face transformers: a Linen module with the package's own pre- and post-processing."""

import copy
import sys
from collections.abc import Mapping
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np

from outlook_parity.backends.jax.base import JaxModel, Values
from outlook_parity.backends.jax.functions import as_jax_arrays
from outlook_parity.backends.jax.hooks import watched_linen
from outlook_parity.backends.jax.linen import MODES, flat, nested
from outlook_parity.core.calls import Arguments, argument_names, called


def is_hugging_face(model: Any) -> bool:
    """Whether this is a `FlaxPreTrainedModel`, which is not imported for it."""
    kind = getattr(sys.modules.get("transformers.modeling_flax_utils"), "FlaxPreTrainedModel", None)
    return kind is not None and isinstance(model, kind)


class HuggingFaceModel(JaxModel):
    """A `FlaxPreTrainedModel`, by its public call with `params=` and `train=`, or what else says its mode."""

    def __init__(self, model: Any, *, training: bool = False) -> None:
        self.model, self._training = model, training
        collections = linen.meta.unbox(dict(model.params))
        # Models with BatchNorm have the collections in `params`, all others the parameters alone.
        self._has_collections = "params" in collections and "batch_stats" in collections
        self.parameters = flat(collections["params"] if self._has_collections else collections)
        self.buffers = flat(collections["batch_stats"]) if self._has_collections else {}
        self.statistics = tuple(self.buffers)

    def prepared(self, dtype: np.dtype, *, training: bool, one_by_one: bool) -> "HuggingFaceModel":
        """See `JaxModel`."""
        model = copy.copy(self.model)
        model._module = self.model.module.clone(dtype=jnp.dtype(dtype))
        model.dtype = jnp.dtype(dtype)
        return HuggingFaceModel(model, training=training)

    def call(self, parameters: Values, buffers: Values, inputs: Arguments, **watching: Any) -> tuple[Any, Values]:
        """See `JaxModel`."""
        names = self.argument_names or frozenset()
        # Where BatchNorm may change its statistics, the call returns them beside the output.
        options: dict[str, Any] = {"params": self._params(parameters, buffers)}
        options |= {name: value == self._training for name, value in MODES.items() if name in names}
        if self._training and "dropout_rng" in names:
            options["dropout_rng"] = jax.random.key(0)
        with watched_linen(**watching):
            output = called(self.model, inputs, **options)
        if self._has_collections and self._training:
            output, changed = output
            return output, buffers | flat(changed["batch_stats"])
        return output, buffers

    @property
    def argument_names(self) -> frozenset[str] | None:
        """See `JaxModel`."""
        return argument_names(type(self.model).__call__)

    def with_weights(self, weights: Mapping[str, np.ndarray]) -> Any:
        """See `JaxModel`: the model is changed."""
        new = as_jax_arrays(weights, self.parameters | self.buffers)
        parameters = {name: new.get(name, value) for name, value in self.parameters.items()}
        buffers = {name: new.get(name, value) for name, value in self.buffers.items()}
        self.model.params = self._params(parameters, buffers)
        return self.model

    def _params(self, parameters: Values, buffers: Values) -> dict[str, Any]:
        tree: dict[str, Any] = nested(parameters)
        return {"params": tree, "batch_stats": nested(buffers)} if self._has_collections else tree
