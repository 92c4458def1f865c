"""Trace the operations that a PyTorch model computes."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from outlook_parity.backends.torch.hooks import running
from outlook_parity.backends.torch.model import dtype_of
from outlook_parity.core.program import CAST, CONSTANT, INPUT, LAYOUT, PARAMETER, Node, Program

# Larger results are not kept.
MOST_KEPT = 1 << 22

_KINDS = {
    **dict.fromkeys(
        (
            "view",
            "_unsafe_view",
            "reshape",
            "permute",
            "transpose",
            "t",
            "expand",
            "unsqueeze",
            "squeeze",
            "clone",
            "alias",
            "detach",
            "lift_fresh",
            "lift_fresh_copy",
            "copy",
            "contiguous",
            "_reshape_alias",
            "repeat",
            "view_as_complex",
            "view_as_real",
        ),
        LAYOUT,
    ),
    **dict.fromkeys(("slice", "select", "unbind", "split", "split_with_sizes", "narrow", "chunk"), "slice"),
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "matmul"), "dot"),
    **dict.fromkeys(("embedding", "index", "index_select", "gather"), "gather"),
    **dict.fromkeys(("cat", "stack"), "concat"),
    **dict.fromkeys(("_softmax", "_safe_softmax"), "softmax"),
    **dict.fromkeys(("clamp_min", "maximum"), "max"),
    **dict.fromkeys(("clamp_max", "minimum"), "min"),
    **dict.fromkeys(("amax",), "reduce max"),
    "_to_copy": CAST,
    "mean": "mean",
    "sum": "sum",
    "convolution": "conv",
    "native_layer_norm": "norm",
    "native_group_norm": "norm",
    "native_batch_norm": "norm",
    "_native_batch_norm_legit": "norm",
    "_native_batch_norm_legit_no_training": "norm",
    "_fused_rms_norm": "norm",
}

# Of the norms, where their eps stands among the arguments.
_EPS = {
    "native_layer_norm": 4,
    "native_group_norm": 7,
    "native_batch_norm": 7,
    "_native_batch_norm_legit": 7,
    "_native_batch_norm_legit_no_training": 6,
    "_fused_rms_norm": 3,
}


class _Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Turns each operation into a node."""

    def __init__(self, path: Callable[[], str], keep: Callable[[str], bool]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.program = Program()
        self._path, self._keep = path, keep
        self._nodes: Any = WeakTensorKeyDictionary()

    def know(self, tensor: torch.Tensor, kind: str) -> None:
        """Name a leaf."""
        self._nodes[tensor] = self._leaf(kind, tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        in_place = name.endswith("_") and not name.endswith("__")
        self._note(name.rstrip("_") if in_place else name, args, kwargs or {}, result)
        return result

    def _note(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        results = result if isinstance(result, list | tuple) else [result]
        tensors = [one for one in results if isinstance(one, torch.Tensor)]
        if not tensors:
            return
        operands = [self._node(one) for one in _flat(args) if isinstance(one, torch.Tensor | int | float)]
        kept = [operand for operand in operands if self._keep(self._path())]
        for operand, one in zip(
            kept, (o for o in _flat(args) if isinstance(o, torch.Tensor | int | float)), strict=False
        ):
            _keep_value(operand, one)
        if name == "addmm":
            product = self._made("dot", operands[1:3], tensors[0], {}, known=False)
            node = self._made("add", [product, operands[0]], tensors[0], {})
            self._nodes[tensors[0]] = node
            return
        settings = _settings(name, args, kwargs, tensors[0])
        kind = _KINDS.get(name, name)
        if kind in (LAYOUT, "slice", CAST, "sum", "mean", "softmax", "norm", "reduce max", "var", "softplus", "elu"):
            operands = [self._node(one) for one in _flat(args) if isinstance(one, torch.Tensor)]
        elif kind in ("add", "sub") and kwargs.get("alpha", 1) != 1:
            kind = f"{kind} scaled"
        elif name == "rsub":
            kind, operands = "sub", [operands[1], operands[0]]
        elif name == "clamp":
            kind, settings = (
                "clamp",
                {"low": _argument(args, kwargs, 1, "min"), "high": _argument(args, kwargs, 2, "max")},
            )
            operands = operands[:1]
        elif name == "gelu":
            settings = {"approximate": kwargs.get("approximate", "none")}
        elif kind == "convolution":
            operands = operands[:2]
        elif name == "masked_fill":
            kind, operands = "where", [operands[1], operands[2], operands[0]]
        for tensor in tensors:
            self._nodes[tensor] = self._made(kind, operands, tensor, settings)

    def _made(
        self, kind: str, operands: list[Node], tensor: torch.Tensor, settings: dict[str, Any], *, known: bool = True
    ) -> Node:
        node = Node(kind, self._path(), operands, tuple(tensor.shape), dtype_of(tensor), settings)
        if known and (self._keep(node.path) or (node.constant and tensor.numel() <= MOST_KEPT)):
            _keep_value(node, tensor)
        self.program.nodes.append(node)
        return node

    def _node(self, one: Any) -> Node:
        if not isinstance(one, torch.Tensor):
            return Node(CONSTANT, "", dtype=type(one).__name__, compute=lambda: one)
        node = self._nodes.get(one)
        if node is None:
            self._nodes[one] = node = self._leaf(CONSTANT, one)
        return node

    def _leaf(self, kind: str, tensor: torch.Tensor) -> Node:
        node = Node(kind, "", (), tuple(tensor.shape), dtype_of(tensor))
        if kind == CONSTANT:
            _keep_value(node, tensor)
        return node


def _keep_value(node: Node, one: Any) -> None:
    """Let a node have its result, as it is now."""
    if isinstance(one, torch.Tensor) and one.numel() <= MOST_KEPT and "value" not in vars(node):
        detached = one.detach()
        node.compute = lambda: _to_numpy(detached)


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.resolve_conj().resolve_neg()
    array: np.ndarray = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()
    return array


def _flat(args: Any) -> Iterator[Any]:
    for one in args:
        if isinstance(one, list | tuple):
            yield from _flat(one)
        elif one is not None and not isinstance(one, bool):
            yield one


def _argument(args: Any, kwargs: Any, index: int, name: str) -> Any:
    return args[index] if len(args) > index else kwargs.get(name)


def _settings(name: str, args: Any, kwargs: Any, result: torch.Tensor) -> dict[str, Any]:
    if name in _EPS:
        return {"eps": float(args[_EPS[name]]), "weight": len(args) > 2}
    if name in ("_softmax", "_safe_softmax"):
        return {"axes": (int(args[1]) % max(result.ndim, 1) - result.ndim,)}
    if name in ("sum", "mean", "amax", "var"):
        axes = _argument(args, kwargs, 1, "dim")
        axes = range(args[0].ndim) if axes in (None, []) else [axes] if isinstance(axes, int) else axes
        return {"axes": tuple(sorted(axis % max(args[0].ndim, 1) - args[0].ndim for axis in axes))}
    if name in ("leaky_relu", "elu", "softplus"):
        return {"numbers": [float(one) for one in args[1:] if isinstance(one, int | float)]}
    return {}


@contextmanager
def traced(model: torch.nn.Module, inputs: Iterable[torch.Tensor], keep: Callable[[str], bool]) -> Iterator[Program]:
    """Trace what the model computes meanwhile.

    Args:
        model: the model.
        inputs: the tensors that it is called with.
        keep: whether the results of the module with this path are kept.
    """
    with running(model) as path, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        tracer = _Tracer(path, keep)
        for tensor in (*model.parameters(), *model.buffers()):
            tracer.know(tensor, PARAMETER if tensor.is_floating_point() else CONSTANT)
        for tensor in inputs:
            tracer.know(tensor, INPUT)
        with tracer:
            yield tracer.program
