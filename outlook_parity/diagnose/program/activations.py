"""Which activations a program has, told by what they compute. Imports no framework.

Operations that together are a function of one number are evaluated on a grid and compared with the known ones: so a
GELU is one however it is written.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from outlook_parity.core.program import CAST, Node

GRID = np.linspace(-8.0, 8.0, 129)

_erf = np.vectorize(math.erf, otypes=[float])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(x, 0)


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _elu(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


# In words -> the function.
ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "ReLU": lambda x: np.maximum(x, 0),
    "GELU (exact)": _gelu,
    "GELU (by tanh)": _gelu_tanh,
    "GELU (quick: x * sigmoid(1.702 x))": lambda x: x * _sigmoid(1.702 * x),
    "SiLU": lambda x: x * _sigmoid(x),
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "softplus": _softplus,
    "ELU": _elu,
    "SELU": lambda x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(np.minimum(x, 0))),
    "leaky ReLU (slope 0.01)": lambda x: np.where(x > 0, x, 0.01 * x),
    "leaky ReLU (slope 0.2)": lambda x: np.where(x > 0, x, 0.2 * x),
    "ReLU6": lambda x: np.clip(x, 0, 6),
    "squared ReLU": lambda x: np.maximum(x, 0) ** 2,
    "hard swish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "hard sigmoid": lambda x: np.clip(x + 3, 0, 6) / 6,
    "hard sigmoid (slope 0.2)": lambda x: np.clip(0.2 * x + 0.5, 0, 1),
    "hard tanh": lambda x: np.clip(x, -1, 1),
    "mish": lambda x: x * np.tanh(_softplus(x)),
    "log sigmoid": lambda x: -_softplus(-x),
    "softsign": lambda x: x / (1 + np.abs(x)),
}

# Functions of one number that are steps of norms, softmaxes and rotary embeddings: no activations by themselves.
_STEPS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "reciprocal": lambda x: 1 / x,
    "cos": np.cos,
    "sin": np.sin,
    "abs": np.abs,
    "sign": np.sign,
    "floor": np.floor,
    "round": np.round,
    "erf": _erf,
    "erfc": lambda x: 1 - _erf(x),
    "log1p": np.log1p,
    "expm1": np.expm1,
    "neg": np.negative,
    "tanh": np.tanh,
    "sigmoid": _sigmoid,
    "relu": ACTIVATIONS["ReLU"],
    "silu": ACTIVATIONS["SiLU"],
    "hardswish": ACTIVATIONS["hard swish"],
    "hardsigmoid": ACTIVATIONS["hard sigmoid"],
    "mish": ACTIVATIONS["mish"],
    "relu6": ACTIVATIONS["ReLU6"],
    CAST: lambda x: x,
}

_OF_TWO: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "true_divide": np.divide,
    "max": np.maximum,
    "min": np.minimum,
    "pow": np.power,
    "where": np.where,
    **dict.fromkeys(("gt", "greater"), np.greater),
    **dict.fromkeys(("ge", "greater_equal"), np.greater_equal),
    **dict.fromkeys(("lt", "less"), np.less),
    **dict.fromkeys(("le", "less_equal"), np.less_equal),
}


def _function(node: Node) -> Callable[..., np.ndarray] | None:
    """Return what an operation computes entry by entry, None if it is not of that kind."""
    if node.kind == "gelu":
        return _gelu if node.settings.get("approximate") == "none" else _gelu_tanh
    if node.kind == "clamp":
        low, high = (node.settings.get(side) for side in ("low", "high"))
        return lambda x: np.clip(x, low, high) if low is not None or high is not None else x
    if node.kind == "pow" and "exponent" in node.settings:
        exponent = node.settings["exponent"]
        return lambda x: np.power(x, exponent)
    numbers = node.settings.get("numbers", [])
    if node.kind == "leaky_relu":
        slope = numbers[0] if numbers else 0.01
        return lambda x: np.where(x > 0, x, slope * x)
    if node.kind == "elu":
        alpha, scale, inner = [*numbers, 1.0, 1.0, 1.0][:3]
        return lambda x: scale * np.where(x > 0, x, alpha * np.expm1(np.minimum(inner * x, 0)))
    if node.kind == "softplus":
        beta = numbers[0] if numbers else 1.0
        return lambda x: _softplus(beta * x) / beta
    return _STEPS.get(node.kind) or _OF_TWO.get(node.kind)


class Regions:
    """Of operations, which are functions of one number, and of which node's.

    Attributes:
        roots: operation -> the node that it is a function of.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.roots: dict[Node, Node] = {}
        self._nodes = nodes
        for node in nodes:
            if node.constant or _function(node) is None:
                continue
            varying = [operand for operand in node.operands if not operand.constant]
            roots = {self.roots.get(operand, operand) for operand in varying}
            if any(operand.constant and operand.number is None for operand in node.operands):
                continue
            if len(roots) == 1 and (root := roots.pop()).floating and root.shape == node.shape:
                self.roots[node] = root

    def ends(self) -> Iterator[Node]:
        """Yield those that more than such operations read: where a function is complete."""
        inner = set()
        for node in self._nodes:
            for operand in node.operands:
                if operand in self.roots and self.roots.get(node) is self.roots[operand]:
                    inner.add(operand)
        outer = {operand for node in self._nodes for operand in node.operands if node not in self.roots}
        for node in self.roots:
            if node.floating and (node not in inner or node in outer):
                yield node

    def evaluate(self, node: Node, x: np.ndarray = GRID) -> np.ndarray:
        """Return the function that ends here, on numbers."""
        results: dict[Node, np.ndarray] = {self.roots[node]: x}

        def of(one: Node) -> np.ndarray:
            if one not in results:
                number = one.number if one.constant else None
                function = None if number is not None else _function(one)
                results[one] = np.asarray(number) if function is None else np.asarray(function(*map(of, one.operands)))
            return results[one]

        with np.errstate(all="ignore"):
            return np.broadcast_to(of(node).astype(np.float64), x.shape)


def name_of(values: np.ndarray) -> str | None:
    """Return the name of an activation by its values on the grid, None if it is not known."""
    for name, function in ACTIVATIONS.items():
        with np.errstate(all="ignore"):
            known = function(GRID)
        if _close(values, known):
            return name
        factor = float(values[-1] / known[-1]) if known[-1] else 0.0
        if factor and math.isfinite(factor) and _close(values, factor * known):
            return f"{factor:.4g} x {name}"
    return None


def linear(values: np.ndarray) -> tuple[float, float] | None:
    """Return factor and offset of a function that is linear on the grid, None if it is not."""
    if not np.isfinite(values).all():
        return None
    factor = float(values[-1] - values[0]) / float(GRID[-1] - GRID[0])
    offset = float(values[len(GRID) // 2])
    return (factor, offset) if _close(values, factor * GRID + offset) else None


# Names of operations that, alone, are steps of something else.
_ALONE = {"exp", "log", "sqrt", "rsqrt", "reciprocal", "cos", "sin", "abs", "sign", "floor", "round", "pow", "log1p"}


def activations(regions: Regions) -> dict[Node, str]:
    """Return the activations by the operation that ends them, in order."""
    found: dict[Node, str] = {}
    for node in regions.ends():
        values = regions.evaluate(node)
        if linear(values) is not None or _is_power_or_step(regions, node):
            continue
        name = name_of(values)
        if name is None and np.isfinite(values).all():
            name = f"a function with f(-1) = {values[56]:.4g}, f(1) = {values[72]:.4g}"
        if name:
            found[node] = name
    return found


def _is_power_or_step(regions: Regions, node: Node) -> bool:
    """Whether it is one step as of a norm or softmax, with numbers multiplied or added."""
    kinds, pending, root = set(), [node], regions.roots[node]
    while pending:
        one = pending.pop()
        if one is root or one.constant:
            continue
        kinds.add(one.kind)
        pending += one.operands
    return (
        bool(kinds & _ALONE)
        and kinds <= _ALONE | {"add", "sub", "mul", "div", "neg", CAST, "max", "min", "clamp"}
        and ("exp" not in kinds or kinds <= {"exp", CAST, "mul", "neg", "max"})
    )


def _close(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.isfinite(one).all() and np.abs(one - other).max() <= 2e-6 * max(float(np.abs(other).max()), 1e-30))
