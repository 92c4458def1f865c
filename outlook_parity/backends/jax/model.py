"""Any JAX model as a `JaxModel`, and the shapes of its weights and outputs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from outlook_common.arrays import is_floating
from outlook_parity.backends.jax.base import JaxModel, Values
from outlook_parity.backends.jax.equinox import EquinoxModel, is_equinox
from outlook_parity.backends.jax.functions import FunctionModel
from outlook_parity.backends.jax.haiku import HaikuModel, is_haiku
from outlook_parity.backends.jax.hugging_face import HuggingFaceModel, is_hugging_face
from outlook_parity.backends.jax.keras import KerasModel, is_keras
from outlook_parity.backends.jax.linen import LinenModel
from outlook_parity.backends.jax.nnx import NNXModel, from_bridge
from outlook_parity.core.outputs import Beside, output_leaves
from outlook_parity.core.request import Inputs


def as_jax_model(model: Any) -> JaxModel:
    """Return a model of any kind as a pure function; what comes of which package is told without importing it.

    Raises:
        TypeError: it is of no known kind.
    """
    if isinstance(model, nnx.Module):
        return NNXModel(model)
    if isinstance(model, linen.Module) and model.scope is not None:
        model = model.unbind()
    for belongs, kind in _KINDS:
        if belongs(model):
            return kind(model)
    match model:
        case (nnx.bridge.ToLinen() as bridge, Mapping() as variables):
            return NNXModel(from_bridge(bridge, variables))
        case (linen.Module() as module, Mapping() as variables) if hasattr(module, "to_nnx"):
            return NNXModel(module.to_nnx(variables))
        case (linen.Module() as module, Mapping() as variables):
            return LinenModel(module, variables)
        case (function, weights, *state) if is_haiku(function) and len(state) < 2:
            return HaikuModel(function, weights, *state)
        case (function, weights) if callable(function) and not isinstance(function, linen.Module):
            owner = getattr(function, "__self__", None)  # of the bound method in (module.apply, variables)
            if isinstance(owner, linen.Module) and isinstance(weights, Mapping) and owner.scope is None:
                return LinenModel(owner, weights)
            if is_equinox(weights):
                return EquinoxModel(weights, function)
            return FunctionModel(function, weights)
        case _ if callable(model) and not isinstance(model, linen.Module):
            return FunctionModel(model)
    raise TypeError(
        "the JAX model must be an nnx.Module, a pair (linen module, variables), a bound linen module, a function, a "
        "pair (function, weights), a pair (haiku.transform(...), params), an equinox.Module, a keras.Model on JAX or a "
        f"FlaxPreTrainedModel, got {_what(model)}"
    )


def _what(model: Any) -> str:
    if not isinstance(model, tuple):
        return type(model).__name__
    return f"a tuple of {', '.join(type(item).__name__ for item in model[:4])}"


_KINDS: tuple[tuple[Callable[[Any], bool], Callable[[Any], JaxModel]], ...] = (
    (is_hugging_face, HuggingFaceModel),
    (is_keras, KerasModel),
    (is_equinox, EquinoxModel),
)


def weights_of(model: JaxModel) -> Values:
    """Return the parameters and statistics by path."""
    return {**model.parameters, **{name: model.buffers[name] for name in model.statistics}}


def shapes_of(model: JaxModel) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters and statistics."""
    return {name: tuple(value.shape) for name, value in weights_of(model).items()}


def transposed_of(model: JaxModel) -> set[str]:
    """Return the paths of transposed convolutions with `transpose_kernel`, whose kernel is as in PyTorch."""
    return {path for path, part in model.modules().items() if getattr(part, "transpose_kernel", False)}


def output_shapes(
    model: JaxModel, inputs: Inputs, keywords: Sequence[str] = (), beside: Beside | None = None
) -> dict[str, Any]:
    """Return shape and dtype of each output in their order, without running the model; floats are float32."""
    prepared = model.prepared(np.dtype(np.float32), training=False, one_by_one=False)
    shapes = [jax.ShapeDtypeStruct(a.shape, np.float32 if is_floating(a) else a.dtype) for a in inputs.values()]  # type: ignore[no-untyped-call]
    order: list[str] = []

    def call(parameters: Values, buffers: Values, *inputs: Any) -> Any:
        arguments = dict(zip(keywords, inputs, strict=True)) if keywords else inputs
        output = prepared.call(parameters, buffers, arguments)[0]
        found = {name: jnp.asarray(leaf) for name, leaf in output_leaves(output, beside).items()}
        order.extend(found)
        return found

    def recast(name: str, value: Any) -> Any:
        """Return a weight, or its shape in float32: a model made under `jax_enable_x64` has others."""
        if name in prepared.rates or value.dtype == np.float32 or not jnp.issubdtype(value.dtype, jnp.floating):
            return value
        return jax.ShapeDtypeStruct(value.shape, np.float32)  # type: ignore[no-untyped-call]

    parameters, buffers = (
        {name: recast(name, value) for name, value in values.items()}
        for values in (prepared.parameters, prepared.buffers)
    )
    found = jax.eval_shape(call, parameters, buffers, *shapes)
    return {name: found[name] for name in order}
