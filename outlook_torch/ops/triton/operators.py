"""Outlook attention in fused Triton kernels: softmax, dropout mask, sum and fold in one pass, backward in two.

Value, logits and mask are all that lives across the forward; backward stores the merged weights of the windows, in
float32 at least, between its two kernels. What is differentiated once more, forward mode and `torch.func` go on with
composite.

The kernels have been run and compared with the oracle under Triton's interpreter, and compiled for CUDA, where
`benchmarks.triton_sass` counts their instructions. Nothing was run or measured on a GPU yet: tiles are untuned.
"""

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from outlook_common.dispatch import Implementation
from outlook_common.geometry import WindowGrid, window_grid
from outlook_torch.ops.composite.sums import composite, nested_forward_mode
from outlook_torch.ops.symbolic import is_symbolic

INSTALLED = find_spec("triton") is not None
# As Triton reads it, which is once, before it defines the first kernel.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on")
# A program keeps rows of weights in registers.
PLACES = 2048


def triton(
    value: Float[Tensor, "B H W N D"],
    logits: Float[Tensor, "B h w N KK KK"],
    dropout_mask: Float[Tensor, "B h w N KK KK"] | None,
    grid: WindowGrid,
) -> Float[Tensor, "B H W N D"]:
    """Return fold(softmax(logits) @ unfold(value)); operands as in `outlook_attention`, already checked."""
    return _apply(value, logits, dropout_mask, grid)


def refusal(value: Tensor, logits: Tensor, dropout_mask: Tensor | None, grid: WindowGrid) -> str | None:
    """Say why these operands cannot be computed this way, or None if they can."""
    if is_symbolic(value):
        return "the graphs of torch.fx need PyTorch alone, and so the reference"
    operands = {"value": value, "logits": logits, "dropout_mask": dropout_mask}
    devices = {name: x.device for name, x in operands.items() if x is not None}
    if not INSTALLED:
        return "Triton is not installed: pip install triton"
    if len(set(devices.values())) > 1:
        return "operands lie on different devices: " + ", ".join(f"{name} on {at}" for name, at in devices.items())
    if value.device.type != "cuda" and not INTERPRETED:
        return (
            f"value is on {value.device}; Triton needs a CUDA device, or TRITON_INTERPRET=1 in the environment from "
            "the start, for its interpreter, which is slow"
        )
    if grid.places > PLACES:
        return f"kernel_size={grid.kernel_size} has {grid.places} places; {PLACES} are the most that registers hold"
    if dropout_mask is not None and dropout_mask.requires_grad:
        return "dropout_mask requires a gradient, which no kernel computes"
    return nested_forward_mode()


@torch.library.custom_op("outlook_attention::attend", mutates_args=())
def _attend(
    value: Tensor,
    logits: Tensor,
    dropout_mask: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
) -> Tensor:
    """Return outlook attention; operands as in `outlook_attention`, sizes as pairs."""
    from outlook_torch.ops.triton.launch import attend  # imports Triton

    return attend(value, logits, dropout_mask, _grid(value, kernel_size, stride, padding))


@torch.library.custom_op("outlook_attention::attend_backward", mutates_args=())
def _attend_backward(
    cotangent: Tensor,
    value: Tensor,
    logits: Tensor,
    dropout_mask: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
) -> tuple[Tensor, Tensor]:
    """Return the gradients of sum(attend(value, logits, …) * cotangent) by value and logits."""
    from outlook_torch.ops.triton.launch import attend_backward

    return attend_backward(cotangent, value, logits, dropout_mask, _grid(value, kernel_size, stride, padding))


@_attend.register_fake
def _(value: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(value, memory_format=torch.contiguous_format)


@_attend_backward.register_fake
def _(cotangent: Tensor, value: Tensor, logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    d_value, d_logits = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (value, logits))
    return d_value, d_logits


def _grid(value: Tensor, *sizes: list[int]) -> WindowGrid:
    # Operators take lists.
    kernel_size, stride, padding = ((size[0], size[1]) for size in sizes)
    return window_grid((value.shape[1], value.shape[2]), kernel_size, stride, padding)


def _gradients(
    cotangent: Tensor, value: Tensor, logits: Tensor, dropout_mask: Tensor | None, grid: WindowGrid
) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled():  # to be differentiated once more
        d_value, d_logits = torch.func.vjp(_composite(dropout_mask, grid), value, logits)[1](cotangent)
    else:
        d_value, d_logits = _attend_backward(cotangent, value, logits, dropout_mask, *_lists(grid))
    return d_value, d_logits


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *operands, kernel_size, stride, padding = inputs
    ctx.grid = _grid(operands[0], kernel_size, stride, padding)
    ctx.save_for_backward(*operands)


def _backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    value, logits, dropout_mask = ctx.saved_tensors
    return *_gradients(cotangent, value, logits, dropout_mask, ctx.grid), None, None, None, None


_attend.register_autograd(_backward, setup_context=_keep)


class _Attend(torch.autograd.Function):
    """The two operators, each other's derivatives."""

    @staticmethod
    def forward(value: Tensor, logits: Tensor, dropout_mask: Tensor | None, grid: WindowGrid) -> Tensor:
        return _attend(value, logits, dropout_mask, *_lists(grid))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *operands, ctx.grid = inputs
        ctx.save_for_backward(*operands)
        ctx.save_for_forward(*operands)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        value, logits, dropout_mask = ctx.saved_tensors
        return *_gradients(cotangent, value, logits, dropout_mask, ctx.grid), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        size, (*operands, grid) = info.batch_size, inputs

        def batched(x: Tensor | None, axis: int | None) -> Tensor | None:
            if x is None:
                return None
            return (x.expand(size, *x.shape) if axis is None else x.movedim(axis, 0)).flatten(0, 1)

        out = _apply(*map(batched, operands, in_dims[:3]), grid)
        return out.reshape(size, -1, *out.shape[1:]), 0

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        value, logits, dropout_mask = ctx.saved_tensors
        directions = tuple(
            torch.zeros_like(x) if t is None else t for x, t in zip((value, logits), tangents, strict=False)
        )
        # Forward mode does not nest; the transpose of the transpose does.
        pull = torch.func.vjp(_composite(dropout_mask, ctx.grid), value, logits)[1]
        push = torch.func.vjp(pull, torch.zeros_like(value))[1]
        out_tangent: Tensor = push(directions)[0]
        return out_tangent


def _apply(*args: Any) -> Tensor:
    if torch.compiler.is_compiling():  # see composite: an autograd.Function would be differentiated once
        *operands, grid = args
        return _attend(*operands, *_lists(grid))
    out: Tensor = _Attend.apply(*args)  # type: ignore[no-untyped-call]
    return out


def _composite(dropout_mask: Tensor | None, grid: WindowGrid) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda value, logits: composite(value, logits, dropout_mask, grid)


def _lists(grid: WindowGrid) -> tuple[list[int], list[int], list[int]]:
    return list(grid.kernel_size), list(grid.stride), list(grid.padding)


def _drawback(*operands: object) -> str:
    # By count, forward in float32 needs on an H100 at least 1.0 times as long as to read the operands and write the
    # result once (volo_d1, seed_512); the reference, which writes all windows and reads them again, twice, moves 5 and
    # 18 times as many bytes. But a kernel that has never run is chosen for nobody.
    return "it was run on no GPU yet, only under Triton's interpreter: ask for it by name"


TRITON = Implementation(run=triton, refusal=refusal, drawback=_drawback)
