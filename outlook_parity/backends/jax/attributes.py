"""Read attributes of Flax modules, and of the operations in a jaxpr."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import Literal

from outlook_parity.backends.jax.jaxprs import bodies_of
from outlook_parity.core.attributes import VARIANCE, Attributes, ints_of, pairs_of
from outlook_parity.core.precision import Products
from outlook_parity.models import jax_layers
from outlook_parity.models.registry import config_attributes

# Paddings that Flax adds before the convolution -> with what.
PADDED_BEFORE = {"circular": "circular", "reflect": "reflect", "causal": "zeros"}


def _convolution(module: Any) -> dict[str, Any]:
    size = module.kernel_size
    axes = 1 if isinstance(size, int) else len(size)
    word = str(module.padding).lower()
    padding: dict[str, Any] = {"padding mode": PADDED_BEFORE.get(word, "zeros")}
    if word not in PADDED_BEFORE:
        padding["padding"] = pairs_of(module.padding, axes)
    return {
        "kernel size": ints_of(size, axes),
        "stride": ints_of(module.strides, axes),
        **padding,
        "dilation": ints_of(module.kernel_dilation, axes),
        "groups": module.feature_group_count,
        "bias": module.use_bias,
    }


def _precision(module: Any, products: Products) -> str:
    own = getattr(module, "precision", None)
    return products if own is None else _PRECISIONS.get(str(own).lower(), str(own))


# A module's own `precision` -> how it computes products; any other under its own name.
_PRECISIONS: dict[str, Products] = {
    **dict.fromkeys(("highest", "float32", "precision.highest"), "full"),
    **dict.fromkeys(("high", "tensorfloat32", "precision.high"), "tf32"),
}


def _flax_norm(module: Any) -> dict[str, Any]:
    return {"eps": float(module.epsilon), "variance": VARIANCE[module.use_fast_variance]}


def _flax_batch_norm(module: Any) -> dict[str, Any]:
    return _flax_norm(module) | {"momentum": 1 - float(module.momentum)}


def _linear(module: Any) -> dict[str, Any]:
    features = getattr(module, "out_features", None) or module.features
    bias = {"bias": module.use_bias}
    return bias | {"features": features} if isinstance(features, int) else bias


# Package and type of a module -> reads its attributes; NNX and Linen have the same names.
READERS: dict[tuple[str, str], Callable[[Any], dict[str, Any]]] = {
    **jax_layers.ATTRIBUTES,
    ("flax", "LayerNorm"): _flax_norm,
    ("flax", "GroupNorm"): lambda module: _flax_norm(module) | {"groups": module.num_groups},
    ("flax", "BatchNorm"): _flax_batch_norm,
    ("flax", "Conv"): _convolution,
    ("flax", "Linear"): _linear,
    ("flax", "Dense"): _linear,
    ("flax", "Dropout"): lambda module: {"dropout rate": float(module.rate)},
}


def attributes_of(modules: dict[str, Any], products: Products) -> Attributes:
    """Return the attributes of the modules; `products` is how JAX is set to compute products."""
    found: Attributes = {}
    for path, module in modules.items():
        found[path] = {}
        for kind in type(module).__mro__:
            read = READERS.get((kind.__module__.partition(".")[0], kind.__name__))
            if read is not None:
                found[path] = read(module)
                if read in (_linear, _convolution):
                    found[path]["precision"] = _precision(module, products)
                break
        found[path] |= config_attributes(module)
    return found


MARK = re.compile(r"⟨(.*?)⟩")


def add_operations(jaxpr: Any, attributes: Attributes) -> None:
    """Add the attributes of the operations in a jaxpr whose name stacks have the modules' paths in ⟨⟩."""
    operations: dict[str, list[Any]] = {}
    for path, equation in _equations(jaxpr, ""):
        operations.setdefault(path, []).append(equation)
    for path, equations in operations.items():
        _add_operations(equations, attributes.setdefault(path, {}))


def _add_operations(equations: list[Any], attributes: dict[str, Any]) -> None:
    """Add the attributes of the operations of one module."""
    names = {equation.primitive.name for equation in equations}
    if names & {"erf", "erfc"}:
        attributes["GELU"] = "exact"
    elif {"tanh", "integer_pow"} <= names:
        attributes["GELU"] = "tanh"
    elif "logistic" in names and any(map(_scales, equations)):  # without a factor it is SiLU
        attributes["GELU"] = "x * sigmoid(c * x)"
    pools = [equation for equation in equations if equation.primitive.name == "reduce_window_sum"]
    if pools and any(any(pair) for equation in pools for pair in equation.params["padding"]):
        attributes["pool divisor"] = "whole window" if len(pools) == 1 else "pixels inside"
    convolutions = [equation for equation in equations if equation.primitive.name == "conv_general_dilated"]
    if len(convolutions) == 1 and "padding" in attributes:
        attributes["padding"] = tuple((int(a), int(b)) for a, b in convolutions[0].params["padding"])


def _scales(equation: Any) -> bool:
    """Whether an operation multiplies by a number."""
    return equation.primitive.name == "mul" and any(isinstance(x, Literal) for x in equation.invars)


def _equations(jaxpr: Any, outer: str) -> Iterator[tuple[str, Any]]:
    """Return every operation, nested ones too, with the path of its module."""
    for equation in jaxpr.eqns:
        marks = MARK.findall(str(equation.source_info.name_stack))
        path = marks[-1] if marks else outer
        yield path, equation
        for inner in bodies_of(equation):
            yield from _equations(inner, path)


def mark(path: str) -> Any:
    """Return a context that marks operations as those of this module."""
    return jax.named_scope(f"⟨{path}⟩")
