"""Faults of the layer: 22 kinds, each planted on the real code path of either twin."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax import lax

import outlook_jax.attention
import outlook_jax.ops.api
import outlook_jax.ops.reference
import outlook_torch.attention
import outlook_torch.ops.api
import outlook_torch.ops.reference
from outlook_common.dispatch import Implementation
from outlook_common.geometry import WindowGrid
from outlook_parity import Report, verify
from outlook_parity.compare.modules import MODEL
from parity_tests.faults.fault import Fault
from parity_tests.support.runners import layer_pair

TORCH_OP, JAX_OP = outlook_torch.ops.reference, outlook_jax.ops.reference
TORCH_API, JAX_API = outlook_torch.ops.api, outlook_jax.ops.api
TORCH_LAYER, JAX_LAYER = outlook_torch.attention, outlook_jax.attention

Layers = tuple[torch.nn.Module, nnx.Module]
Plant = Callable[[Layers, pytest.MonkeyPatch], None]

SIZES = {"dim": 12, "num_heads": 3, "kernel_size": 3, "padding": 1, "stride": 2, "qkv_bias": True}


def pair(sizes: dict[str, Any]) -> Layers:
    return layer_pair(**{**SIZES, **sizes}, implementation="reference", dtype="float32", seed=7)


def check(layers: Layers, *dtypes: str) -> Report:
    inputs = np.random.default_rng(5).standard_normal((2, 7, 9, 12))
    return verify(*layers, inputs, levels=("forward", "layers"), dtypes=dtypes or ("float64", "float32"))


def replaced(owner: ModuleType, name: str, make: Callable[[Any], Any]) -> Plant:
    """Plant a bug by wrapping a function of a module: `make` gets the honest one."""
    return lambda layers, patch: patch.setattr(owner, name, make(getattr(owner, name)))


def other_op(owner: ModuleType, make: Callable[[Any], Any]) -> Plant:
    """Plant a bug in place of the reference of one twin."""
    honest = owner.IMPLEMENTATIONS["reference"].run
    bad = Implementation(run=make(honest), refusal=lambda *operands: None)
    return lambda layers, patch: patch.setitem(owner.IMPLEMENTATIONS, "reference", bad)


def in_torch_weights(change: Callable[[dict[str, torch.nn.Parameter]], None]) -> Plant:
    def plant(layers: Layers, patch: pytest.MonkeyPatch) -> None:
        with torch.no_grad():
            change(dict(layers[0].named_parameters()))

    return plant


def in_jax_weights(change: Callable[[Any], None]) -> Plant:
    return lambda layers, patch: change(layers[1])


def _set(variable: Any, array: Any) -> None:
    variable[...] = array


def _forget_torch(layers: Layers, patch: pytest.MonkeyPatch) -> None:
    layers[0].proj.register_parameter("bias", None)


def _forget_jax(layers: Layers, patch: pytest.MonkeyPatch) -> None:
    layers[1].proj.bias = None
    layers[1].proj.use_bias = False


def _swapped_window_axes(honest: Any) -> Any:
    """Rows and columns of the window's weights exchanged: the output place is read as the input place."""
    return lambda value, logits, mask, grid, **kw: honest(value, logits.swapaxes(-1, -2), mask, grid, **kw)


def _wrong_axis_torch(honest: Any) -> Any:
    def run(value: Any, logits: Any, mask: Any, grid: WindowGrid) -> Any:
        probabilities = logits.softmax(dim=-2)
        windows = TORCH_OP._unfold(value, grid)
        return TORCH_OP._fold(probabilities @ windows, grid)

    return run


def _wrong_axis_jax(honest: Any) -> Any:
    def run(value: Any, logits: Any, mask: Any, grid: WindowGrid, precision: Any = None) -> Any:
        probabilities = jax.nn.softmax(logits, axis=-2)
        windows = JAX_OP._unfold(value, grid)
        mixed = jnp.einsum("bhwnpq,bhwnqd->bhwnpd", probabilities, windows, precision=precision)
        return JAX_OP._fold(mixed, grid)

    return run


def _full_window_torch(honest: Any) -> Any:
    """The average divides by the whole window, also where it reaches past the border."""

    def pool(x: torch.Tensor, stride: tuple[int, int], spare: tuple[int, int]) -> torch.Tensor:
        beyond = [-size % step for size, step in zip(x.shape[1:3], stride, strict=True)]
        padded = torch.nn.functional.pad(x, (0, 0, 0, beyond[1], 0, beyond[0]))
        return honest(padded, stride, spare)

    return pool


def _full_window_jax(honest: Any) -> Any:
    def pool(x: jax.Array, stride: tuple[int, int]) -> jax.Array:
        beyond = [-size % step for size, step in zip(x.shape[1:3], stride, strict=True)]
        return honest(jnp.pad(x, ((0, 0), (0, beyond[0]), (0, beyond[1]), (0, 0))), stride)

    return pool


def _dilated_torch(honest: Any) -> Any:
    """Padding taken for dilation, as in External-Attention-pytorch, with what padding then fits the map."""

    def unfold(value: torch.Tensor, grid: WindowGrid) -> torch.Tensor:
        B, H, W, N, D = value.shape
        padding = [p * (k - 1) // 2 for p, k in zip(grid.padding, grid.kernel_size, strict=True)]
        windows = torch.nn.functional.unfold(
            value.permute(0, 3, 4, 1, 2).reshape(B, N * D, H, W),
            grid.kernel_size,
            dilation=grid.padding,
            padding=padding,
            stride=grid.stride,
        )
        return windows.reshape(B, N, D, grid.places, *grid.grid).permute(0, 4, 5, 1, 3, 2)

    return unfold


def _dilated_jax(honest: Any) -> Any:
    def unfold(value: jax.Array, grid: WindowGrid) -> jax.Array:
        B, H, W, N, D = value.shape
        reach = [p * (k - 1) // 2 for p, k in zip(grid.padding, grid.kernel_size, strict=True)]
        windows = lax.conv_general_dilated_patches(
            value.reshape(B, H, W, N * D),
            grid.kernel_size,
            grid.stride,
            [(p, p) for p in reach],
            rhs_dilation=grid.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return windows.reshape(B, *grid.grid, N, D, grid.places).swapaxes(-1, -2)

    return unfold


def _interleaved_heads(honest: Any) -> Any:
    """Channel c goes to head c % N instead of c // D, on the way in and on the way out."""

    def attention(value: Any, *args: Any, **kwargs: Any) -> Any:
        *lead, N, D = value.shape
        mixed = value.reshape(*lead, D, N).swapaxes(-1, -2)
        return honest(mixed, *args, **kwargs).swapaxes(-1, -2).reshape(*lead, N, D)

    return attention


def _shifted_fold_torch(honest: Any) -> Any:
    return lambda windows, grid: torch.roll(honest(windows, grid), 1, dims=1)


def _shifted_fold_jax(honest: Any) -> Any:
    return lambda windows, grid: jnp.roll(honest(windows, grid), 1, axis=1)


def _averaging_fold_torch(honest: Any) -> Any:
    def fold(windows: torch.Tensor, grid: WindowGrid) -> torch.Tensor:
        return honest(windows, grid) / honest(torch.ones_like(windows), grid).clamp(min=1)

    return fold


def _averaging_fold_jax(honest: Any) -> Any:
    def fold(windows: jax.Array, grid: WindowGrid) -> jax.Array:
        return honest(windows, grid) / jnp.maximum(honest(jnp.ones_like(windows), grid), 1)

    return fold


def _one_bad_place_torch(bad: float) -> Callable[[Any], Any]:
    def make(honest: Any) -> Any:
        def fold(windows: torch.Tensor, grid: WindowGrid) -> torch.Tensor:
            out = honest(windows, grid)
            place = torch.zeros_like(out)
            place[0, 1, 1, 0, 0] = bad
            return out + place

        return fold

    return make


def _one_bad_place_jax(bad: float) -> Callable[[Any], Any]:
    return lambda honest: lambda windows, grid: honest(windows, grid).at[0, 1, 1, 0, 0].add(bad)


def _bfloat16_inside_torch(honest: Any) -> Any:
    """Windows are rounded to bfloat16 unless float64 is asked for: exact where the truth is, coarse in float32."""

    def unfold(value: torch.Tensor, grid: WindowGrid) -> torch.Tensor:
        windows = honest(value, grid)
        return windows if windows.dtype == torch.float64 else windows.to(torch.bfloat16).to(windows.dtype)

    return unfold


def _bfloat16_inside_jax(honest: Any) -> Any:
    def unfold(value: jax.Array, grid: WindowGrid) -> jax.Array:
        windows = honest(value, grid)
        # Not a pair of casts, which XLA may leave out.
        return windows if windows.dtype == jnp.float64 else lax.reduce_precision(windows, 8, 7)

    return unfold


def _no_scale(layers: Layers, patch: pytest.MonkeyPatch, twin: int) -> None:
    object.__setattr__(layers[twin].config, "qk_scale", 1.0)


def _no_value_bias_torch(layers: Layers, patch: pytest.MonkeyPatch) -> None:
    """The bias is there, and is not used."""

    class Unbiased(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.weight)

    layers[0].v.__class__ = Unbiased


def _no_value_bias_jax(layers: Layers, patch: pytest.MonkeyPatch) -> None:
    class Unbiased(nnx.Linear):
        def __call__(self, x: jax.Array) -> jax.Array:
            return x @ self.kernel[...]

    layers[1].v.__class__ = Unbiased


def _reverse_heads(variable: Any) -> None:
    """The three heads' logits in the opposite order; PyTorch has outputs first, JAX last."""
    if isinstance(variable, torch.Tensor):
        variable.copy_(variable.reshape(3, 81, -1).flip(0).reshape(variable.shape))
    else:
        kernel = variable[...]
        variable[...] = kernel.reshape(-1, 3, 81)[:, ::-1].reshape(kernel.shape)


def _off_by_one_torch(honest: Any) -> Any:
    return lambda value, grid: honest(torch.roll(value, 1, dims=2), grid)


def _off_by_one_jax(honest: Any) -> Any:
    return lambda value, grid: honest(jnp.roll(value, 1, axis=2), grid)


def _subsampled(honest: Any) -> Any:
    return lambda x, stride, *_: x[:, :: stride[0], :: stride[1]]


def _tf32_torch(layers: Layers, patch: pytest.MonkeyPatch) -> None:
    """Products of numbers with 10 bits, in float32 alone."""

    class TF32(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.dtype != torch.float32:
                return super().forward(x)
            coarse = (x.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)
            return torch.nn.functional.linear(coarse, self.weight, self.bias)

    layers[0].v.__class__ = TF32


def _tf32_jax(layers: Layers, patch: pytest.MonkeyPatch) -> None:
    class TF32(nnx.Linear):
        def __call__(self, x: jax.Array) -> jax.Array:
            return super().__call__(lax.reduce_precision(x, 8, 10) if x.dtype == jnp.float32 else x)

    layers[1].v.__class__ = TF32


def _half_torch(layers: Layers, patch: pytest.MonkeyPatch) -> None:
    """Logits by way of float16, whose largest number is 65504, in float32 alone."""

    class Half(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = super().forward(x)
            return out if out.dtype == torch.float64 else (out * 1e5).half().to(out.dtype) / 1e5

    layers[0].attn.__class__ = Half


def _half_jax(layers: Layers, patch: pytest.MonkeyPatch) -> None:
    class Half(nnx.Linear):
        def __call__(self, x: jax.Array) -> jax.Array:
            out = super().__call__(x)
            return out if out.dtype == jnp.float64 else (out * 1e5).astype(jnp.float16).astype(out.dtype) / 1e5

    layers[1].attn.__class__ = Half


@dataclass(frozen=True)
class LayerFault(Fault):
    """A bug in one twin's layer of outlook attention."""

    plant: Plant
    sizes: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float64"  # the one that must show it

    def run(self, patch: pytest.MonkeyPatch) -> Report:
        layers = pair(self.sizes)
        self.plant(layers, patch)
        return check(layers, self.dtype)


def _fault(twin_and_name: str, plant: Plant, path: str, cause: str, sizes: Any = None, **options: Any) -> LayerFault:
    twin, _, name = twin_and_name.partition(": ")
    return LayerFault(name, twin, path, cause, plant, sizes or {}, **options)


FAULTS = [
    _fault(
        "torch: square weight transposed",
        in_torch_weights(lambda p: p["v.weight"].copy_(p["v.weight"].T.clone())),
        "v",
        "transposed",
    ),
    _fault(
        "jax: square weight transposed",
        in_jax_weights(lambda m: _set(m.v.kernel, m.v.kernel[...].T)),
        "v",
        "transposed",
    ),
    _fault("torch: window axes swapped", other_op(TORCH_API, _swapped_window_axes), MODEL, "softmax"),
    _fault("jax: window axes swapped", other_op(JAX_API, _swapped_window_axes), MODEL, "softmax"),
    _fault("torch: scale dropped", lambda layers, patch: _no_scale(layers, patch, 0), MODEL, "scale"),
    _fault("jax: scale dropped", lambda layers, patch: _no_scale(layers, patch, 1), MODEL, "scale"),
    _fault(
        "torch: border pool by the full window",
        replaced(TORCH_LAYER, "average_pool", _full_window_torch),
        MODEL,
        "pool",
    ),
    _fault("jax: border pool by the full window", replaced(JAX_LAYER, "average_pool", _full_window_jax), MODEL, "pool"),
    _fault(
        "torch: padding as dilation",
        replaced(TORCH_OP, "_unfold", _dilated_torch),
        MODEL,
        "aggregate (which pixels",
        {"kernel_size": 5, "padding": 2},
    ),
    _fault(
        "jax: padding as dilation",
        replaced(JAX_OP, "_unfold", _dilated_jax),
        MODEL,
        "aggregate (which pixels",
        {"kernel_size": 5, "padding": 2},
    ),
    _fault("torch: softmax over the wrong axis", other_op(TORCH_API, _wrong_axis_torch), MODEL, "softmax"),
    _fault("jax: softmax over the wrong axis", other_op(JAX_API, _wrong_axis_jax), MODEL, "softmax"),
    _fault("torch: NaN in one weight", in_torch_weights(lambda p: p["proj.weight"][3, 4].fill_(np.nan)), "proj", "NaN"),
    _fault(
        "jax: NaN in one weight",
        in_jax_weights(lambda m: _set(m.proj.kernel, m.proj.kernel[...].at[4, 3].set(jnp.nan))),
        "proj",
        "NaN",
    ),
    _fault("torch: NaN in one place", replaced(TORCH_OP, "_fold", _one_bad_place_torch(np.nan)), MODEL, "fold"),
    _fault("jax: NaN in one place", replaced(JAX_OP, "_fold", _one_bad_place_jax(np.nan)), MODEL, "fold"),
    _fault("torch: one place off by 1e-6", replaced(TORCH_OP, "_fold", _one_bad_place_torch(1e-06)), MODEL, "fold"),
    _fault("jax: one place off by 1e-6", replaced(JAX_OP, "_fold", _one_bad_place_jax(1e-06)), MODEL, "fold"),
    _fault("torch: a tensor missing", _forget_torch, "proj", "missing"),
    _fault("jax: a tensor missing", _forget_jax, "proj", "missing"),
    _fault(
        "torch: heads interleaved", replaced(TORCH_LAYER, "outlook_attention", _interleaved_heads), MODEL, "which head"
    ),
    _fault("jax: heads interleaved", replaced(JAX_LAYER, "outlook_attention", _interleaved_heads), MODEL, "which head"),
    _fault("torch: fold shifted by one", replaced(TORCH_OP, "_fold", _shifted_fold_torch), MODEL, "fold"),
    _fault("jax: fold shifted by one", replaced(JAX_OP, "_fold", _shifted_fold_jax), MODEL, "fold"),
    _fault("torch: fold averages overlaps", replaced(TORCH_OP, "_fold", _averaging_fold_torch), MODEL, "fold"),
    _fault("jax: fold averages overlaps", replaced(JAX_OP, "_fold", _averaging_fold_jax), MODEL, "fold"),
    _fault("torch: value bias unused", _no_value_bias_torch, "v", "bias"),
    _fault("jax: value bias unused", _no_value_bias_jax, "v", "bias"),
    _fault(
        "torch: bfloat16 inside float32",
        replaced(TORCH_OP, "_unfold", _bfloat16_inside_torch),
        MODEL,
        "torch errs as bfloat16 would",
        dtype="float32",
    ),
    _fault(
        "jax: bfloat16 inside float32",
        replaced(JAX_OP, "_unfold", _bfloat16_inside_jax),
        MODEL,
        "jax errs as bfloat16 would",
        dtype="float32",
    ),
    _fault(
        "torch: heads in another order", in_torch_weights(lambda p: _reverse_heads(p["attn.weight"])), "attn", "axis 0"
    ),
    _fault("jax: heads in another order", in_jax_weights(lambda m: _reverse_heads(m.attn.kernel)), "attn", "axis 0"),
    _fault("torch: weights ten times too large", in_torch_weights(lambda p: p["v.weight"].mul_(10)), "v", "0.1 times"),
    _fault(
        "jax: weights ten times too large",
        in_jax_weights(lambda m: _set(m.v.kernel, 10 * m.v.kernel[...])),
        "v",
        "10 times",
    ),
    _fault(
        "torch: another weight's values",
        in_torch_weights(lambda p: p["v.weight"].copy_(p["proj.weight"])),
        "v",
        "values of proj.weight",
    ),
    _fault(
        "jax: another weight's values",
        in_jax_weights(lambda m: _set(m.v.kernel, m.proj.kernel[...])),
        "v",
        "values of proj.weight",
    ),
    _fault("torch: windows one pixel off", replaced(TORCH_OP, "_unfold", _off_by_one_torch), MODEL, "aggregate"),
    _fault("jax: windows one pixel off", replaced(JAX_OP, "_unfold", _off_by_one_jax), MODEL, "aggregate"),
    _fault("torch: no pooling, every other pixel", replaced(TORCH_LAYER, "average_pool", _subsampled), MODEL, "pool"),
    _fault("jax: no pooling, every other pixel", replaced(JAX_LAYER, "average_pool", _subsampled), MODEL, "pool"),
    _fault(
        "torch: TF32 left on",
        _tf32_torch,
        "v",
        "in float32 alone: torch errs as tf32 or float16 would",
        dtype="float32",
    ),
    _fault("jax: TF32 left on", _tf32_jax, "v", "in float32 alone: jax errs as tf32 or float16 would", dtype="float32"),
    _fault("torch: overflow of float16", _half_torch, "attn", "Inf", dtype="float32"),
    _fault("jax: overflow of float16", _half_jax, "attn", "Inf", dtype="float32"),
]
