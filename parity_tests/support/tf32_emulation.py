"""TF32 where no device has it: products in both frameworks as such a device would compute them, told to or not.

Every product of float32 rounds what it multiplies to 10 explicit bits if, and only if, its framework is told so at that
moment: PyTorch by its switches, JAX by the precision of the operation, which it has from `default_matmul_precision` or
from the model. Products of gradients are products too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import torch
from jax import lax
from jax._src.interpreters import mlir  # lowering rules can be replaced, but not read, by the public module
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# PyTorch's products, and which of their arguments are multiplied.
TORCH_PRODUCTS: dict[Any, tuple[int, ...]] = {
    aten.mm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.bmm.default: (0, 1),
    aten.baddbmm.default: (1, 2),
    aten.convolution.default: (0, 1),
    aten.convolution_backward.default: (0, 1, 2),
}


def rounded(x: Any) -> Any:
    """Return a tensor with 10 explicit bits of float32's 23, halves away from zero; any other as it is."""
    if x.dtype != torch.float32:
        return x
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class TorchTF32(TorchDispatchMode):
    """PyTorch on a device with TF32."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in TORCH_PRODUCTS and torch.backends.cuda.matmul.fp32_precision == "tf32":
            args = tuple(rounded(x) if index in TORCH_PRODUCTS[func] else x for index, x in enumerate(args))
        return func(*args, **(kwargs or {}))


JAX_PRODUCTS = (lax.dot_general_p, lax.conv_general_dilated_p)
COARSE = (lax.Precision.HIGH, lax.Precision.HIGH)


def coarse(product: Any, honest: Any) -> Any:
    """Return how JAX lowers a product on a device with TF32."""

    def multiply(one: jax.Array, other: jax.Array, **settings: Any) -> jax.Array:
        one, other = (lax.reduce_precision(x, 8, 10) for x in (one, other))
        return product.bind(one, other, **settings | {"precision": (lax.Precision.HIGHEST,) * 2})

    rounding = mlir.lower_fun(multiply, multiple_results=False)

    def lower(context: Any, one: Any, other: Any, **settings: Any) -> Any:
        told = settings["precision"] == COARSE and all(aval.dtype == "float32" for aval in context.avals_in)
        return (rounding if told else honest)(context, one, other, **settings)

    return lower


@contextmanager
def tf32_devices() -> Iterator[None]:
    """Give the CPUs of both frameworks TF32."""
    rules = mlir._platform_specific_lowerings["cpu"]
    before = {product: rules[product] for product in JAX_PRODUCTS}
    jax.clear_caches()  # what was compiled before knows no TF32
    try:
        for product, entry in before.items():
            mlir.register_lowering(product, coarse(product, entry.rule), platform="cpu")
        with TorchTF32():
            yield
    finally:
        rules.update(before)
        jax.clear_caches()
