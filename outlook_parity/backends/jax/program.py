"""Read the operations of a jaxpr, with results that are computed only when they are asked for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from outlook_parity.backends.jax.attributes import MARK
from outlook_parity.core.program import CAST, CONSTANT, INPUT, LAYOUT, PARAMETER, Node, Program

_KINDS = {
    **dict.fromkeys(
        (
            "reshape",
            "transpose",
            "broadcast_in_dim",
            "squeeze",
            "expand_dims",
            "copy",
            "copy_p",
            "stop_gradient",
            "optimization_barrier",
            "sharding_constraint",
            "reduce_precision",
            "device_put",
        ),
        LAYOUT,
    ),
    "convert_element_type": CAST,
    "dot_general": "dot",
    "conv_general_dilated": "conv",
    "logistic": "sigmoid",
    "integer_pow": "pow",
    "select_n": "where",
    "reduce_sum": "sum",
    "reduce_max": "reduce max",
    "concatenate": "concat",
    "dynamic_slice": "slice",
    "split": "slice",
}

# Names of the parameter in which operations have what they call, where that is read.
_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")
# Not looked into: what runs more or less than once, or on a part of its operands (on each device its own).
_OPAQUE = ("scan", "while", "cond", "shard_map")


def program_of(closed: Any, kinds: Sequence[str], arguments: Sequence[Any]) -> Program:
    """Return the operations of a jaxpr whose name stacks have the modules' paths in ⟨⟩.

    Args:
        closed: the jaxpr with its constants.
        kinds: "parameter" or "input" of each argument.
        arguments: their values.
    """
    reader = _Reader()
    values = [_leaf(kind, value) for kind, value in zip(kinds, arguments, strict=True)]
    reader.read(closed.jaxpr, [*map(_constant, closed.consts)], values, "")
    return reader.program


def leaf_kinds(parameters: Mapping[str, Any], buffers: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[str]:
    """Return the kinds of the arguments, in the order in which JAX flattens them."""
    return [PARAMETER] * len(parameters) + [PARAMETER] * len(buffers) + [INPUT] * len(inputs)


def _leaf(kind: str, value: Any) -> Node:
    return Node(kind, "", (), tuple(np.shape(value)), str(getattr(value, "dtype", "")), compute=lambda: value)


def _constant(value: Any) -> Node:
    return _leaf(CONSTANT, value)


class _Reader:
    """Turns each equation into a node, those of inner calls too."""

    def __init__(self) -> None:
        self.program = Program()
        self._rng = np.random.default_rng(0)

    def read(self, jaxpr: Any, constants: Sequence[Node], arguments: Sequence[Node], outer: str) -> list[Node]:
        known: dict[Any, Node] = dict(zip(jaxpr.constvars, constants, strict=True))
        known |= dict(zip(jaxpr.invars, arguments, strict=True))

        def node_of(variable: Any) -> Node:
            return known[variable] if not hasattr(variable, "val") else _constant(variable.val)

        for equation in jaxpr.eqns:
            marks = MARK.findall(str(equation.source_info.name_stack))
            path = marks[-1] if marks else outer
            operands = [node_of(variable) for variable in equation.invars]
            name = equation.primitive.name
            inner = next((equation.params[one] for one in _CALLS if one in equation.params), None)
            if inner is not None and name not in _OPAQUE and hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                constants = [*map(_constant, getattr(inner, "consts", ()))]
                body = getattr(inner, "jaxpr", inner)
                results = self.read(body, constants, operands[-len(body.invars) :] if body.invars else [], path)
            else:
                results = self._nodes(equation, operands, path)
            known |= dict(zip(equation.outvars, results, strict=False))
        return [node_of(variable) for variable in jaxpr.outvars]

    def _nodes(self, equation: Any, operands: list[Node], path: str) -> list[Node]:
        name = equation.primitive.name
        kind, used = _KINDS.get(name, name), operands
        settings = _settings(name, equation.params, operands)
        if kind == "where" and len(operands) == 3:  # the first is for False
            used = [operands[0], operands[2], operands[1]]
        if name == "square":
            kind, settings = "pow", {"exponent": 2.0}
        elif name == "erf_inv" or name == "clamp":
            used = [operands[1], operands[0], operands[2]] if name == "clamp" else operands
            if name == "clamp":
                settings = {"low": operands[0].number, "high": operands[2].number}
                used = operands[1:2]
        compute = self._compute(equation, operands)
        nodes = [
            Node(kind, path, used, tuple(out.aval.shape), str(out.aval.dtype), settings, compute(index))
            for index, out in enumerate(equation.outvars)
        ]
        self.program.nodes += nodes
        return nodes

    def _compute(self, equation: Any, operands: list[Node]) -> Callable[[int], Callable[[], Any]]:
        """Return what computes a result: random numbers for products, which tell as much and take no time."""
        results: list[Any] = []
        random = equation.primitive.name in ("dot_general", "conv_general_dilated", *_OPAQUE)

        def compute() -> list[Any]:
            if not results:
                values = [operand.value for operand in operands]
                if any(value is None for value in values):
                    return [None] * len(equation.outvars)
                arrays = [jax.numpy.asarray(value) for value in values]
                found = equation.primitive.bind(*arrays, **equation.params)
                results.extend(found if equation.primitive.multiple_results else [found])
            return results

        def drawn(index: int) -> Any:
            aval = equation.outvars[index].aval
            if "float" not in str(aval.dtype):
                return compute()[index]
            return self._rng.standard_normal(aval.shape).astype(aval.dtype)

        def result(index: int) -> Callable[[], Any]:
            if random and not all(operand.constant for operand in operands):
                return lambda: drawn(index)
            return lambda: compute()[index]

        return result


def _settings(name: str, parameters: Mapping[str, Any], operands: Sequence[Node]) -> dict[str, Any]:
    if name in ("reduce_sum", "reduce_max"):
        axes = len(operands[0].shape)
        return {"axes": tuple(sorted(axis - axes for axis in parameters["axes"]))}
    if name == "integer_pow":
        return {"exponent": float(parameters["y"])}
    if name == "dot_general":
        contracted, batch = parameters["dimension_numbers"]
        return {"batch": batch, "contracted": contracted}
    return {}
