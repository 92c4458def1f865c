"""What a JAX model says about itself: its modules' attributes, and the operations of its jaxpr."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax

from outlook_parity.core.attributes import OWN_ATTRIBUTES, PASSES, Facts, ints_of, pairs_of
from outlook_parity.core.precision import Products

# Words for a padding that is none of the convolution's own, its operand is padded before; and with what.
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
    asked = getattr(module, "precision", None)
    return products if asked is None else _PRECISIONS.get(str(asked).lower(), str(asked))


# What modules are told about their products; anything else is called what it is.
_PRECISIONS: dict[str, Products] = {
    **dict.fromkeys(("highest", "float32", "precision.highest"), "full"),
    **dict.fromkeys(("high", "tensorfloat32", "precision.high"), "tf32"),
}


def _flax_norm(module: Any) -> dict[str, Any]:
    return {"eps": float(module.epsilon), "variance": PASSES[module.use_fast_variance]}


def _flax_batch_norm(module: Any) -> dict[str, Any]:
    return _flax_norm(module) | {"momentum": 1 - float(module.momentum)}


def _own_batch_norm(module: Any) -> dict[str, Any]:
    return {"eps": float(module.epsilon), "momentum": float(module.momentum)}  # as PyTorch counts it


def _linear(module: Any) -> dict[str, Any]:
    features = getattr(module, "out_features", None) or module.features
    said = {"bias": module.use_bias}
    return said | {"features": features} if isinstance(features, int) else said


# What modules say, by module and name of the type: NNX's and Linen's are called alike.
READERS: dict[tuple[str, str], Callable[[Any], dict[str, Any]]] = {
    ("flax", "LayerNorm"): _flax_norm,
    ("flax", "GroupNorm"): lambda module: _flax_norm(module) | {"groups": module.num_groups},
    ("flax", "BatchNorm"): _flax_batch_norm,
    ("outlook_jax", "BatchNorm"): _own_batch_norm,
    ("flax", "Conv"): _convolution,
    ("flax", "Linear"): _linear,
    ("flax", "Dense"): _linear,
    ("flax", "Dropout"): lambda module: {"dropout rate": float(module.rate)},
}


def attributes_of(modules: dict[str, Any], products: Products) -> Facts:
    """Return what the modules say before anything runs; `products` is how JAX multiplies where they do not say it."""
    facts: Facts = {}
    for path, module in modules.items():
        facts[path] = {}
        for kind in type(module).__mro__:
            read = READERS.get((kind.__module__.partition(".")[0], kind.__name__))
            if read is not None:
                facts[path] = read(module)
                if read in (_linear, _convolution):
                    facts[path]["precision"] = _precision(module, products)
                break
        for fact, name in OWN_ATTRIBUTES.items():
            if isinstance(value := getattr(getattr(module, "config", None), name, None), int | float | tuple):
                facts[path][fact] = value
    return facts


MARK = re.compile(r"⟨(.*?)⟩")


def add_operations(jaxpr: Any, facts: Facts) -> None:
    """Add to the facts what the operations of a jaxpr tell whose name stacks have the modules' paths in ⟨⟩."""
    found: dict[str, list[Any]] = {}
    for path, equation in _equations(jaxpr, ""):
        found.setdefault(path, []).append(equation)
    for path, equations in found.items():
        names = {equation.primitive.name for equation in equations}
        own = facts.setdefault(path, {})
        if names & {"erf", "erfc"}:
            own["GELU"] = "exact"
        elif {"tanh", "integer_pow"} <= names:
            own["GELU"] = "tanh"
        elif "logistic" in names:
            own["GELU"] = "x * sigmoid(c * x)"
        pools = [equation for equation in equations if equation.primitive.name == "reduce_window_sum"]
        if pools and any(any(pair) for equation in pools for pair in equation.params["padding"]):
            own["pool divisor"] = "whole window" if len(pools) == 1 else "pixels inside"
        convolutions = [equation for equation in equations if equation.primitive.name == "conv_general_dilated"]
        if len(convolutions) == 1 and "padding" in own:
            own["padding"] = tuple((int(a), int(b)) for a, b in convolutions[0].params["padding"])


def _equations(jaxpr: Any, outer: str) -> Iterator[tuple[str, Any]]:
    """Return every operation, those inside others too, with the path of the module that it is in."""
    for equation in jaxpr.eqns:
        marks = MARK.findall(str(equation.source_info.name_stack))
        path = marks[-1] if marks else outer
        yield path, equation
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner, path)


def mark(path: str) -> Any:
    """Return a context in which operations are known to be of this module."""
    return jax.named_scope(f"⟨{path}⟩")
