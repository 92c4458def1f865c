"""Run the op or the layer of either twin on NumPy arrays."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
from flax import nnx

import outlook_jax
import outlook_torch
from outlook_common.op_cases import Case
from outlook_jax.ops import IMPLEMENTATIONS as JAX_IMPLEMENTATIONS
from outlook_parity.models.builtin import draw_weights
from outlook_torch.ops import IMPLEMENTATIONS as TORCH_IMPLEMENTATIONS
from parity_tests.support.arithmetic import QUICKLY
from parity_tests.support.oracle import Operands, Results

Array = np.ndarray
Gradients = dict[str, Array]

SMALL = 5_000

DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


@dataclass(frozen=True)
class Device:
    torch: torch.device
    jax: jax.Device


def find_device(kind: str) -> Device | None:
    """Return the frameworks' devices of this kind; on a TPU the PyTorch twin runs on the CPU."""
    try:
        jax_device = jax.devices(kind)[0]
    except RuntimeError:
        return None
    if kind == "gpu" and not torch.cuda.is_available():
        return None
    return Device(torch.device("cuda" if kind == "gpu" else "cpu"), jax_device)


CPU = Device(torch.device("cpu"), jax.devices("cpu")[0])


def to_torch(array: Array, device: Device = CPU) -> torch.Tensor:
    """Copy an array bit for bit; PyTorch does not read NumPy's bfloat16."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).to(device.torch)
    return torch.from_numpy(array.copy()).to(device.torch)


def from_torch(tensor: torch.Tensor) -> Array:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def to_jax(array: Array, device: Device = CPU) -> jax.Array:
    return jax.device_put(array, device.jax)


def _compiler_options(x: Array, implementation: str | None) -> dict[str, Any] | None:
    """Return those of XLA for what compiles for longer than it runs; optimization changes but the order of sums.

    The reference takes the windows of a map by convolutions: plain loops in float64, slow where LLVM leaves them so.
    """
    return None if implementation == "reference" and x.size > SMALL else QUICKLY


def run_torch(operands: Operands, case: Case, device: Device = CPU, implementation: str | None = None) -> Results:
    value, logits = (to_torch(x, device).requires_grad_() for x in (operands.value, operands.logits))
    mask = None if operands.dropout_mask is None else to_torch(operands.dropout_mask, device)
    out = outlook_torch.outlook_attention(
        value, logits, **case.window, dropout_mask=mask, implementation=implementation
    )
    grads = torch.autograd.grad(out, (value, logits), to_torch(operands.cotangent, device))
    return Results(*map(from_torch, (out, *grads)))


def run_jax(
    operands: Operands,
    case: Case,
    device: Device = CPU,
    implementation: str | None = None,
    *,
    optimized: bool = False,
) -> Results:
    options = None if optimized else _compiler_options(operands.value, implementation)

    # All are arguments: constants XLA would fold, for seconds.
    @partial(jax.jit, compiler_options=options)
    def run(value: jax.Array, logits: jax.Array, cotangent: jax.Array, mask: jax.Array | None) -> tuple:
        def op(value: jax.Array, logits: jax.Array) -> jax.Array:
            return outlook_jax.outlook_attention(
                value, logits, **case.window, dropout_mask=mask, implementation=implementation
            )

        out, pullback = jax.vjp(op, value, logits)
        return out, *pullback(cotangent)

    arguments = (None if x is None else to_jax(x, device) for x in operands)
    return Results(*map(np.asarray, run(*arguments)))


Runner = Callable[..., Results]

# Every implementation of both twins, as (framework, implementation); Triton's and Pallas' have suites of their own,
# under their interpreters.
IMPLEMENTATIONS: dict[tuple[str, str], Runner] = {
    **{("torch", name): run_torch for name in TORCH_IMPLEMENTATIONS if name != "triton"},
    **{("jax", name): run_jax for name in JAX_IMPLEMENTATIONS if name != "pallas"},
}


def draw(case: Case, seed: int, dtype: str = "float64", *, dropout: float = 0.0) -> Operands:
    rng = np.random.default_rng(seed)
    mask = None
    if dropout:
        mask = (rng.random(case.logits_shape) >= dropout).astype(np.float32) / np.float32(1 - dropout)
    value, logits, cotangent = (
        (scale * rng.standard_normal(shape)).astype(DTYPES[dtype])
        for scale, shape in ((1, case.value_shape), (2, case.logits_shape), (1, case.value_shape))
    )
    return Operands(value, logits, cotangent, mask)


def layer_pair(
    *args: Any, seed: int = 0, dtype: str = "float64", **kwargs: Any
) -> tuple[outlook_torch.OutlookAttention, outlook_jax.OutlookAttention]:
    """Return both twins' layer with the same weights, drawn from `seed`, in training mode."""
    torch_layer = outlook_torch.OutlookAttention(*args, **kwargs, dtype=getattr(torch, dtype))
    # Not drawn: the weights are overwritten, and XLA compiles each draw.
    undrawn = {"kernel_init": nnx.initializers.zeros, "param_dtype": dtype}
    jax_layer = outlook_jax.OutlookAttention(*args, **kwargs, **undrawn, rngs=nnx.Rngs(seed))
    copy_weights(torch_layer, jax_layer, draw_weights(torch_layer.config, seed))
    return torch_layer, jax_layer


def copy_weights(torch_layer: torch.nn.Module, jax_layer: nnx.Module, weights: dict[str, Array]) -> None:
    """Set both layers' linear parameters by hand: the loaders of the package have their own tests."""
    for name, array in weights.items():
        module, leaf = name.split(".")
        parameter = getattr(torch_layer, module).get_parameter(leaf)
        parameter.data.copy_(torch.from_numpy(array))
        variable = getattr(getattr(jax_layer, module), {"weight": "kernel", "bias": "bias"}[leaf])
        variable[...] = jnp.asarray(array.T, variable[...].dtype)


def bits(value: jax.Array) -> Array:
    """Return the numbers of an array of JAX, which may be of keys, with no program compiled to compare them."""
    return np.asarray(jax.random.key_data(value) if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) else value)


def relative_error(a: Array, b: Array) -> float:
    """Return max|a - b| / max|b|; an empty, zero or non-finite comparison is an error of the test."""
    assert a.shape == b.shape, (a.shape, b.shape)
    assert a.size > 0
    assert np.isfinite(a).all()
    assert np.isfinite(b).all()
    scale = np.abs(b).max()
    assert scale > 0
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max() / scale)


def torch_gradients(layer: torch.nn.Module, x: Array, cotangent: Array, **masks: Array) -> tuple[Array, Gradients]:
    """Return the output, and the gradients of sum(out * cotangent) by name, "x" the input's."""
    x = torch.from_numpy(x).requires_grad_()
    out = layer(x, **{name: torch.from_numpy(mask) for name, mask in masks.items()})
    names, parameters = zip(*layer.named_parameters(), strict=True)
    grads = torch.autograd.grad(out, (x, *parameters), torch.from_numpy(cotangent))
    return from_torch(out), dict(zip(("x", *names), map(from_torch, grads), strict=True))


def jax_gradients(layer: nnx.Module, x: Array, cotangent: Array, **masks: Array) -> tuple[Array, Gradients]:
    """Return output and gradients as the torch runner does, in PyTorch's layout."""
    graph, parameters, rest = nnx.split(layer, nnx.Param, ...)

    @partial(jax.jit, compiler_options=_compiler_options(x, layer.implementation))
    def run(parameters: nnx.State, x: jax.Array, cotangent: jax.Array) -> tuple:
        def apply(parameters: nnx.State, x: jax.Array) -> jax.Array:
            return nnx.merge(graph, parameters, rest)(x, **{name: jnp.asarray(mask) for name, mask in masks.items()})

        out, pullback = jax.vjp(apply, parameters, x)
        return out, *pullback(cotangent)

    out, d_parameters, d_x = run(parameters, jnp.asarray(x), jnp.asarray(cotangent))
    gradients = {"x": np.asarray(d_x)}
    for (module, leaf), variable in nnx.to_flat_state(d_parameters):
        gradients[f"{module}.{'weight' if leaf == 'kernel' else leaf}"] = np.asarray(variable[...]).T
    return np.asarray(out), gradients
