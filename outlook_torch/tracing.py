"""Symbolic tracing: what forward methods do for `torch.fx` and `torch.jit.script`."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, fx, nn

Forward = TypeVar("Forward", bound=Callable[..., Any])


def traceable(forward: Forward) -> Forward:
    """Remove the annotations of a forward method, which torch.fx writes into the code of its graphs.

    Shapes are no types of TorchScript, and cannot be pickled.
    """
    forward.__annotations__ = {}
    return forward


def option(value: Any) -> Any:
    """Return an option of a forward method, its default where torch.fx made it an input of the graph.

    Such an input is removed from the graph: it could have no effect.
    """
    if not isinstance(value, fx.Proxy) or value.node.op != "placeholder" or not value.node.args:
        return value
    (default,) = value.node.args
    value.node.graph.erase_node(value.node)
    return default


def checked_images(images: Tensor, in_chans: int, rows: int, columns: int, stride: int) -> Tensor:
    """Return `images`; raise a ValueError if their shape does not fit, when the traced graph or script runs.

    Args:
        images: (B, C, H, W).
        in_chans: C.
        rows: H, or 0 for any multiple of `stride`.
        columns: W, likewise.
        stride: of the model, in pixels.
    """
    # Not `check_images`, which TorchScript cannot compile.
    fits = images.dim() == 4 and images.shape[1] == in_chans
    if fits and rows > 0:
        fits = images.shape[2] == rows and images.shape[3] == columns
    elif fits:
        fits = images.shape[2] % stride == 0 and images.shape[3] % stride == 0
    if not fits:
        expected = f"{rows}, {columns}" if rows > 0 else f"multiples of {stride}"
        raise ValueError(f"images must have shape (B, {in_chans}, {expected}), got {images.shape}")
    return images


class ScriptTracer(fx.Tracer):
    """Traces a model into a graph that TorchScript compiles: layers that follow train() and eval() stay as they are."""

    def __init__(self, leaves: tuple[type[nn.Module], ...] = ()) -> None:
        super().__init__()
        self.leaves = leaves

    def is_leaf_module(self, module: nn.Module, module_qualified_name: str) -> bool:
        """Say whether the graph calls this module, rather than what it consists of."""
        return isinstance(module, self.leaves) or super().is_leaf_module(module, module_qualified_name)


def scriptable(model: nn.Module, leaves: tuple[type[nn.Module], ...] = ()) -> fx.GraphModule:
    """Return the graph of `model`, with its own parameters, for `torch.jit.script`, which cannot read its source.

    Args:
        model: of this package.
        leaves: modules that TorchScript compiles from their source.
    """
    graph = ScriptTracer(leaves).trace(model)
    return fx.GraphModule(model, graph, type(model).__name__).train(model.training)
