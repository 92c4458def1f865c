"""Outlook attention as one local weighted sum per output phase (see `outlook_common.taps`); no window is ever moved.

The sum is bilinear in the probabilities and the values, and so are both its transposes: two operators, `mix` and
`gram`, are each other's derivatives. Backward, of any order, and `vmap` all run on these two.

Both are an embedding bag: for each pixel and head, a weighted sum over a short list of rows. Its kernels keep the sum
in registers, which a sum of shifted maps, one elementwise operation after the other, cannot do.

What PyTorch's kernels promise, which see float32 and float64 alone, as sums run in no less:

- On a CPU and on CUDA they gather, each sum in one thread or warp and in one order: the same bits in every run. Under
  `torch.use_deterministic_algorithms(True)` all runs as without; PyTorch lists `EmbeddingBag` among what raises on CUDA
  for mode "max" alone, and here it is "sum". By PyTorch's documentation and sources: no GPU has run it yet.
- On CUDA the gradient by weights has a warp of 32 threads for each sample, which it numbers in an int: at 2^26 samples
  that overflows. Batches are cut so that no call has so many; an image that alone has is refused there.
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from outlook_common.dispatch import Implementation
from outlook_common.geometry import WindowGrid, grid_size, window_grid
from outlook_torch.ops.composite.samples import Samples, blocks, most_samples, samples
from outlook_torch.ops.reference import widened
from outlook_torch.ops.symbolic import is_symbolic

# Below so many numbers in the windows' values for each place of a window, without or with gradients, or with so few
# channels per head for them, the reference takes less time on a CPU: composite then waits for the many small operations
# that merge K*K places.
NUMBERS_PER_PLACE = {False: 256, True: 1024}
PLACES_PER_CHANNEL = 3
SAMPLES = 2**26  # too many for one call of PyTorch's kernels on CUDA


def composite(
    value: Float[Tensor, "B H W N D"],
    logits: Float[Tensor, "B h w N KK KK"],
    dropout_mask: Float[Tensor, "B h w N KK KK"] | None,
    grid: WindowGrid,
) -> Float[Tensor, "B H W N D"]:
    """Return fold(softmax(logits) @ unfold(value)); operands as in `outlook_attention`, already checked."""
    # Softmax and sums run in float32 at least; the probabilities are rounded to value's dtype in between. With the map
    # last, both run along contiguous memory.
    probabilities = widened(_map_last(logits)).softmax(dim=3)
    if dropout_mask is not None:
        probabilities = probabilities * _map_last(dropout_mask)
    weights = widened(probabilities.to(value.dtype))
    return mix(weights, widened(value), grid).to(value.dtype)


def _map_last(x: Float[Tensor, "B h w N KK KK"]) -> Float[Tensor, "B N KK KK h w"]:
    return x.permute(0, 3, 4, 5, 1, 2)


@torch.library.custom_op("outlook_attention::mix", mutates_args=())
def _mix(weights: Tensor, value: Tensor, kernel_size: list[int], stride: list[int], padding: list[int]) -> Tensor:
    """Return, at each pixel x, the sum over d of the merged weights W[x, d] * value[x + d].

    Args:
        weights: (B, N, K*K, K*K, h, w), what output place p of a window takes from its input place q.
        value: (B, H, W, N, D), of the same dtype.
        kernel_size: K, a pair, as are `stride` and `padding`.
        stride: S.
        padding: P.

    Returns:
        (B, H, W, N, D).
    """
    H, W, N = value.shape[1:4]
    grid = _grid((H, W), kernel_size, stride, padding)
    if value.numel() == 0:
        return torch.zeros_like(value, memory_format=torch.contiguous_format)
    table = samples(grid, N, value.device)
    out = [_mix_images(*images, table, grid) for images in _cut(weights, value, table)]
    return out[0] if len(out) == 1 else torch.cat(out)


def _mix_images(
    weights: Float[Tensor, "B N KK KK h w"], value: Float[Tensor, "B H W N D"], table: Samples, grid: WindowGrid
) -> Float[Tensor, "B H W N D"]:
    B, H, W, N, D = value.shape
    image = _images(table.sources, B)
    weight = _merged(weights, grid).index_select(1, table.slots)
    out, *_ = torch.embedding_bag(
        value.reshape(-1, D),
        (table.sources + H * W * N * image).flatten(),
        (table.offsets[:-1] + len(table.slots) * image).flatten(),
        per_sample_weights=weight.flatten(),
    )
    return out.view(B, H, W, N, D)


@torch.library.custom_op("outlook_attention::gram", mutates_args=())
def _gram(out: Tensor, value: Tensor, kernel_size: list[int], stride: list[int], padding: list[int]) -> Tensor:
    """Return, for each pair of places p and q of each window, the product out[p] · value[q] over D.

    Args:
        out: (B, H, W, N, D).
        value: (B, H, W, N, D), of the same dtype.
        kernel_size: K, a pair, as are `stride` and `padding`.
        stride: S.
        padding: P.

    Returns:
        (B, N, K*K, K*K, h, w); zero for places outside the map.
    """
    B, H, W, N = value.shape[:4]
    grid = _grid((H, W), kernel_size, stride, padding)
    if value.numel() == 0:
        return value.new_zeros(B, N, grid.places, grid.places, *grid.grid)
    table = samples(grid, N, value.device)
    products = [_gram_images(*images, table, grid) for images in _cut(out, value, table)]
    return products[0] if len(products) == 1 else torch.cat(products)


def _gram_images(
    out: Float[Tensor, "B H W N D"], value: Float[Tensor, "B H W N D"], table: Samples, grid: WindowGrid
) -> Float[Tensor, "B N KK KK h w"]:
    B, H, W, N, D = value.shape
    image = _images(table.sources, B)
    # An embedding bag's gradient by its weights, which torch.embedding_bag would compute beside others.
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        out.reshape(-1, D),
        value.reshape(-1, D),
        (table.sources + H * W * N * image).flatten(),
        (table.offsets[:-1] + len(table.slots) * image).flatten(),
        (table.targets + H * W * N * image).flatten(),
        0,  # the mode "sum"
    )
    products = torch.nn.functional.pad(products.view(B, -1), (0, 1))  # for slots that have no sample
    return _per_window(products.index_select(1, table.sample_of_slot), N, grid)


def _lists(grid: WindowGrid) -> tuple[list[int], list[int], list[int]]:
    return list(grid.kernel_size), list(grid.stride), list(grid.padding)


def _grid(map_size: tuple[int, int], *sizes: list[int]) -> WindowGrid:
    # Operators take lists.
    kernel_size, stride, padding = ((size[0], size[1]) for size in sizes)
    return window_grid(map_size, kernel_size, stride, padding)


def _cut(first: Tensor, second: Tensor, table: Samples) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield both tensors by as many images as have fewer than SAMPLES samples."""
    images = max(1, (SAMPLES - 1) // max(1, len(table.slots)))
    return zip(torch.split(first, images), torch.split(second, images), strict=True)


def _images(like: Int[Tensor, " n"], images: int) -> Int[Tensor, "B 1"]:
    return torch.arange(images, dtype=like.dtype, device=like.device)[:, None]


def _merged(weights: Float[Tensor, "B N KK KK h w"], grid: WindowGrid) -> Float[Tensor, "B slots"]:
    """Return the sum of all weights at one displacement, for each slot."""
    B, N = weights.shape[:2]
    (K, L), (h, w) = grid.kernel_size, grid.grid
    windows = weights.reshape(B, N, K, L, K, L, h, w)
    merged = weights.new_zeros(B, blocks(grid, N)[-1].stop)
    for (p, s), part in _parts(merged, N, grid):
        part += windows[:, :, p, s]
    return merged


def _per_window(products: Float[Tensor, "B slots"], heads: int, grid: WindowGrid) -> Float[Tensor, "B N KK KK h w"]:
    """Give each pair of places of a window the product at their displacement."""
    (K, L), (h, w) = grid.kernel_size, grid.grid
    windows = products.new_empty(len(products), heads, K, L, K, L, h, w)
    for (p, s), part in _parts(products, heads, grid):
        windows[:, :, p, s] = part
    return windows.view(len(products), heads, grid.places, grid.places, h, w)


def _parts(slots: Float[Tensor, "B slots"], heads: int, grid: WindowGrid) -> Any:
    """Yield, for each place (p, s) of a window, the view of its K·K weights in all windows: (B, N, K, K, h, w)."""
    (K, L), (h, w) = grid.kernel_size, grid.grid
    for block in blocks(grid, heads):
        view = slots[:, block.start : block.stop].view(len(slots), *block.shape)
        for (m, p), (n, s) in product(enumerate(block.row.places), enumerate(block.column.places)):
            i, j = block.row.index(p, 0), block.column.index(s, 0)
            yield (p, s), view[:, :, i : i + K, j : j + L, m : m + h, n : n + w]


@_mix.register_fake
def _(weights: Tensor, value: Tensor, kernel_size: list[int], stride: list[int], padding: list[int]) -> Tensor:
    return torch.empty_like(value, memory_format=torch.contiguous_format)


@_gram.register_fake
def _(out: Tensor, value: Tensor, kernel_size: list[int], stride: list[int], padding: list[int]) -> Tensor:
    B, H, W, N, _ = value.shape  # these may be symbols, of which no grid can be made
    places = kernel_size[0] * kernel_size[1]
    return value.new_empty(B, N, places, places, grid_size(H, stride[0]), grid_size(W, stride[1]))


# Compiled programs call the operators themselves, which have their own formulas: what torch.compile makes of an
# autograd.Function is differentiated once, and a second time in silence to wrong numbers. Forward mode, which an
# operator's formula cannot have, is an error there.


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    first, second, *ctx.sizes = inputs
    ctx.save_for_backward(first, second)


def _mix_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    weights, value = ctx.saved_tensors
    d_weights = _gram(cotangent, value, *ctx.sizes) if ctx.needs_input_grad[0] else None
    d_value = _mix(weights.transpose(2, 3), cotangent, *ctx.sizes) if ctx.needs_input_grad[1] else None
    return d_weights, d_value, None, None, None


def _gram_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    out, value = ctx.saved_tensors
    d_out = _mix(cotangent, value, *ctx.sizes) if ctx.needs_input_grad[0] else None
    d_value = _mix(cotangent.transpose(2, 3), out, *ctx.sizes) if ctx.needs_input_grad[1] else None
    return d_out, d_value, None, None, None


def _batched(operator: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, int]]:
    def batched(info: Any, in_dims: tuple[Any, ...], first: Tensor, second: Tensor, *sizes: Any) -> tuple[Tensor, int]:
        operands = _merged_axes(info.batch_size, in_dims, first, second)
        out = operator(*operands, *sizes)
        return out.reshape(info.batch_size, -1, *out.shape[1:]), 0

    return batched


def _merged_axes(size: int, in_dims: tuple[Any, ...], *operands: Tensor) -> list[Tensor]:
    """Return the operands with the axis of `torch.func.vmap` merged into the batch."""
    moved = [
        x.expand(size, *x.shape) if axis is None else x.movedim(axis, 0)
        for x, axis in zip(operands, in_dims, strict=False)
    ]
    return [x.flatten(0, 1) for x in moved]


_mix.register_vmap(_batched(_mix))
_gram.register_vmap(_batched(_gram))
_mix.register_autograd(_mix_backward, setup_context=_keep)
_gram.register_autograd(_gram_backward, setup_context=_keep)


def mix(
    weights: Float[Tensor, "B N KK KK h w"], value: Float[Tensor, "B H W N D"], grid: WindowGrid
) -> Float[Tensor, "B H W N D"]:
    """Return, at each pixel x, the sum over d of the merged weights W[x, d] * value[x + d]; differentiable."""
    return _mix(weights, value, *_lists(grid)) if torch.compiler.is_compiling() else _Mix.apply(weights, value, grid)  # type: ignore[no-untyped-call]


def gram(
    out: Float[Tensor, "B H W N D"], value: Float[Tensor, "B H W N D"], grid: WindowGrid
) -> Float[Tensor, "B N KK KK h w"]:
    """Return, for each pair of places p and q of each window, the product out[p] · value[q] over D; differentiable."""
    return _gram(out, value, *_lists(grid)) if torch.compiler.is_compiling() else _Gram.apply(out, value, grid)  # type: ignore[no-untyped-call]


class _Bilinear(torch.autograd.Function):
    """A custom operator that is linear in either of its two tensors."""

    operator: ClassVar[Callable[..., Tensor]]

    @classmethod
    def forward(cls, first: Tensor, second: Tensor, grid: WindowGrid) -> Tensor:
        return cls.operator(first, second, *_lists(grid))

    @classmethod
    def jvp(cls, ctx: Any, first_tangent: Tensor | None, second_tangent: Tensor | None, _: None) -> Tensor:
        first, second = ctx.saved_tensors
        parts = [
            cls.apply(*operands, ctx.grid)  # type: ignore[no-untyped-call]
            for operands in ((first_tangent, second), (first, second_tangent))
            if None not in operands
        ]
        return sum(parts[1:], parts[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        first, second, ctx.grid = inputs
        ctx.save_for_backward(first, second)
        ctx.save_for_forward(first, second)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], first: Tensor, second: Tensor, grid: WindowGrid) -> Any:
        one, other = _merged_axes(info.batch_size, in_dims, first, second)
        out = cls.apply(one, other, grid)  # type: ignore[no-untyped-call]
        return out.reshape(info.batch_size, -1, *out.shape[1:]), 0


class _Mix(_Bilinear):
    operator = _mix

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        weights, value = ctx.saved_tensors
        d_weights = gram(cotangent, value, ctx.grid) if ctx.needs_input_grad[0] else None
        d_value = mix(weights.transpose(2, 3), cotangent, ctx.grid) if ctx.needs_input_grad[1] else None
        return d_weights, d_value, None


class _Gram(_Bilinear):
    operator = _gram

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        out, value = ctx.saved_tensors
        d_out = mix(cotangent, value, ctx.grid) if ctx.needs_input_grad[0] else None
        d_value = mix(cotangent.transpose(2, 3), out, ctx.grid) if ctx.needs_input_grad[1] else None
        return d_out, d_value, None


def _refusal(value: Tensor, logits: Tensor, dropout_mask: Tensor | None, grid: WindowGrid) -> str | None:
    if is_symbolic(value):
        return "the graphs of torch.fx need PyTorch alone, and so the reference"
    if torch.compiler.is_exporting():
        return "an exported program would need this package wherever it runs; the reference needs PyTorch alone"
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return "a traced program with an autograd.Function in it cannot be saved; the reference has none"
    if value.device.type == "cuda" and not torch.compiler.is_compiling():  # in a compiled program, sizes may be symbols
        found = most_samples(grid, value.shape[3])
        if found >= SAMPLES:
            return f"an image has up to {found} samples; PyTorch's kernels on CUDA take fewer than {SAMPLES} at once"
    return nested_forward_mode()


def nested_forward_mode() -> str | None:
    """Say why no implementation by an autograd.Function can run here, or None if one can."""
    forward = _forward_modes()
    if torch.compiler.is_compiling():
        return (
            "forward mode inside torch.compile needs the reference, without an operator of its own" if forward else None
        )
    # PyTorch switches forward mode off inside of jvp(), so that the outer derivative would silently lack terms.
    return "forward mode inside forward mode needs the reference, without an autograd.Function" if forward > 1 else None


def _forward_modes() -> int:
    """Return how many transformations by torch.func.jvp are around; the compiler asks it while it traces them."""
    transforms = torch._C._functorch.get_interpreter_stack() or []
    return sum(transform.key() == torch._C._functorch.TransformType.Jvp for transform in transforms)


# What `torch.compiler.assume_constant_result` sets, which imports the compiler, for longer than PyTorch takes itself.
_forward_modes._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _drawback(value: Tensor, logits: Tensor, dropout_mask: Tensor | None, grid: WindowGrid) -> str | None:
    if value.device.type != "cpu":
        return None
    B, h, w, N, _, _ = logits.shape
    D = value.shape[-1]
    gradients = torch.is_grad_enabled() and (value.requires_grad or logits.requires_grad)
    if (numbers := B * h * w * N * D) < (least := NUMBERS_PER_PLACE[gradients] * grid.places):
        if torch.compiler.is_compiling():  # which takes a symbolic size that is written out for a constant
            return "the reference is faster on so small a map: ask for it by name"
        return (
            f"the reference is faster on so small a map: {B} * {h} * {w} windows of {N * D} channels make {numbers} "
            f"numbers, and kernel_size={grid.kernel_size} needs {least} {'with' if gradients else 'without'} "
            f"gradients: ask for it by name"
        )
    if grid.places > PLACES_PER_CHANNEL * D:
        return (
            f"the reference is faster with {D} channels per head; kernel_size={grid.kernel_size} needs "
            f"{-(-grid.places // PLACES_PER_CHANNEL)}: ask for it by name"
        )
    return None


COMPOSITE = Implementation(run=composite, refusal=_refusal, drawback=_drawback)
