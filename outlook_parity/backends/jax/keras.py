"""Keras models on the JAX backend."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import jax.numpy as jnp
import numpy as np

from outlook_parity.backends.jax.base import JaxModel, Values
from outlook_parity.backends.jax.functions import as_jax_arrays
from outlook_parity.backends.jax.hooks import watched_classes
from outlook_parity.core.calls import Arguments, argument_names, called

# Keras' names of leaves -> Flax's, whose layouts are the same.
LEAVES = {
    "gamma": "scale",
    "beta": "bias",
    "embeddings": "embedding",
    "moving_mean": "mean",
    "moving_variance": "var",
}


def is_keras(model: Any) -> bool:
    """Whether this is a layer or model of Keras, which is not imported for it."""
    kind = getattr(getattr(sys.modules.get("keras"), "layers", None), "Layer", None)
    return kind is not None and isinstance(model, kind)


class KerasModel(JaxModel):
    """A `keras.Model` or layer, by `stateless_call`.

    Raises:
        TypeError: Keras runs on another backend than JAX.
    """

    def __init__(self, model: Any, dtype: str | None = None, *, training: bool = False) -> None:
        import keras  # type: ignore[import-not-found]

        if keras.backend.backend() != "jax":
            raise TypeError(
                f"the Keras model runs on {keras.backend.backend()}; set KERAS_BACKEND=jax before Keras is imported"
            )
        self.model, self._dtype, self._training = model, dtype, training
        self._root = model.name
        self._trainable = {self._name(variable): variable for variable in model.trainable_variables}
        self._others = {self._name(variable): variable for variable in model.non_trainable_variables}
        self.parameters = {name: variable.value for name, variable in self._trainable.items()}
        self.buffers = {name: variable.value for name, variable in self._others.items()}
        self.statistics = tuple(name for name in self.buffers if name.endswith((".mean", ".var")))

    def prepared(self, dtype: np.dtype, *, training: bool, one_by_one: bool) -> "KerasModel":
        """See `JaxModel`."""
        return KerasModel(self.model, dtype.name, training=training)

    def call(self, parameters: Values, buffers: Values, inputs: Arguments, **watching: Any) -> tuple[Any, Values]:
        """See `JaxModel`."""
        watching.pop("draws", None)
        layers = dict(self._layers())
        paths = {id(layer): path for path, layer in layers.items() if not _fused(layer)}
        own = "training" in (self.argument_names or ())
        variables = [*self._trainable.values(), *self._others.values()]
        kinds = {type(layer) for layer in layers.values()}
        with _computing_in(self._dtype, [*layers.values()], variables), watched_classes(paths, kinds, **watching):
            output, after = called(
                self.model.stateless_call,
                inputs,
                [parameters[name] for name in self._trainable],
                [buffers[name] for name in self._others],
                **({"training": self._training} if own else {}),
            )
        return output, dict(zip(self._others, after, strict=True))

    def modules(self) -> dict[str, Any]:
        """See `JaxModel`."""
        return dict(self._layers())

    @property
    def argument_names(self) -> frozenset[str] | None:
        """See `JaxModel`."""
        return argument_names(self.model.call)

    def with_weights(self, weights: Mapping[str, np.ndarray]) -> Any:
        """See `JaxModel`: the model is changed."""
        for name, array in as_jax_arrays(weights).items():
            (self._trainable | self._others)[name].assign(array)
        return self.model

    def _name(self, variable: Any) -> str:
        *owner, leaf = variable.path.split("/")
        owner = owner[1:] if owner[:1] == [self._root] else owner
        return ".".join([*owner, LEAVES.get(leaf, leaf)])

    def _layers(self) -> Iterator[tuple[str, Any]]:
        yield "", self.model
        for layer in self.model._flatten_layers(include_self=False):
            steps = str(layer.path or layer.name).split("/")
            yield ".".join(steps[1:] if steps[:1] == [self._root] else steps), layer


def _fused(layer: Any) -> bool:
    """Whether a layer with weights applies an activation itself, for which PyTorch has a function or another module."""
    activation = getattr(layer, "activation", None)
    return bool(layer.weights) and getattr(activation, "__name__", "linear") != "linear"


@contextmanager
def _computing_in(dtype: str | None, layers: list[Any], variables: list[Any]) -> Iterator[None]:
    """Let layers compute in a dtype, and variables have it: Keras casts both to their own."""
    with ExitStack() as restoring:
        for layer in layers if dtype else ():
            restoring.callback(setattr, layer, "dtype_policy", layer.dtype_policy)
            layer.dtype_policy = dtype
        for variable in variables if dtype else ():
            if jnp.issubdtype(variable.value.dtype, jnp.floating):
                restoring.callback(setattr, variable, "_dtype", variable._dtype)
                variable._dtype = dtype
        yield
